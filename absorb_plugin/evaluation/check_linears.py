"""Zeros of every Linear of a checkpoint, beside what its recipe planned."""

from collections.abc import Mapping, Sequence

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match_targets
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb_plugin.evaluation.check_report import CheckReport, LinearZeros
from absorb_plugin.evaluation.check_shapes import weights_not_found
from absorb_plugin.evaluation.plan import stored_names
from absorb_plugin.evaluation.shards import Checkpoint
from absorb_plugin.evaluation.zeros import Count, count_dense, count_quantized
from absorb_plugin.groups import EXPERT

__all__ = ["FLOATS", "block_of", "count_linears"]

FLOATS = ("BF16", "F16", "F32", "F64")
# The format whose matrices do not tell their shape.
PACKED = "pack-quantized"


def count_linears(
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel | None,
    plan: Mapping[str, float],
    schemes: QuantizationConfig | None,
    report: CheckReport,
) -> None:
    """
    Into the report.

    :param skeleton: the model without weights; None if transformers cannot build it
    :param plan: full name of a Linear of the model -> planned share of zeros
    :param schemes: of the quantised ones
    """
    if report.other_method:
        report.warnings.append(
            f"quantised by {report.other_method}: zeros are not counted"
        )
        return
    stored = _stored_linears(checkpoint)
    names = {name: name for name in stored if block_of(name)}
    packed: dict[str, float] = {}
    if skeleton is not None:
        modules = dict(skeleton.named_modules())
        head = skeleton.get_output_embeddings()
        linears = [
            name
            for name, module in modules.items()
            if isinstance(module, torch.nn.Linear) and module is not head
        ]
        names = stored_names(linears, stored)
        absent = [name for name in plan if name in linears and name not in names]
        sizes = {name: modules[name].weight.numel() for name in absent}
        packed = _packed_experts(checkpoint, plan, sizes)
        blocks = {block_of(name) for name in packed}
        absent = [name for name in absent if block_of(name) not in blocks]
        if absent and _all_found(checkpoint):
            report.warnings.append(
                f"{len(absent)} Linears of recipe.yaml are in the files by names that "
                f"this check does not know, {absent[0]} for one: their zeros are not "
                "counted"
            )
        elif absent:
            report.problems.append(
                f"{len(absent)} Linears of recipe.yaml are not in the files, "
                f"{absent[0]} for one"
            )
    bar = tqdm(names.items(), desc="Counting zeros", unit="Linear", leave=False)
    for name, saved in bar:
        try:
            count = _count(checkpoint, saved, stored[saved], schemes)
        except _AbsentPart as error:
            report.linears.clear()
            report.problems.append(str(error))
            return
        if count is None:
            report.linears.clear()
            report.warnings.append(
                f"the weights of {saved} are in no format that this check knows: "
                "zeros are not counted"
            )
            return
        columns = max(1, count.weights // max(1, _rows(checkpoint, saved)))
        planned = plan.get(name)
        report.linears[saved] = LinearZeros(block_of(saved), count, columns, planned)
    for name, share in packed.items():
        count = count_dense(checkpoint.pieces(name))
        columns = min(checkpoint.shape(name)[1:])
        report.linears[name] = LinearZeros(block_of(name), count, columns, share)


def _all_found(checkpoint: Checkpoint) -> bool:
    """Whether transformers finds all weights."""
    try:
        return not weights_not_found(checkpoint.directory)
    except Exception:  # whatever it raises, it does not
        return False


def _packed_experts(
    checkpoint: Checkpoint, plan: Mapping[str, float], absent: Mapping[str, int]
) -> dict[str, float]:
    """
    Tensors of all experts of a block, where single ones are not in the files -> the
    mean of what is planned for these.

    :param absent: Linears that are not in the files -> their weights
    """
    planned: dict[str, float] = {}
    weights: dict[str, int] = {}
    for name, size in absent.items():
        if EXPERT.search(name):
            block = block_of(name)
            planned[block] = planned.get(block, 0.0) + plan[name] * size
            weights[block] = weights.get(block, 0) + size
    return {
        name: planned[block] / weights[block]
        for name in checkpoint.names
        if (block := block_of(name)) in weights
        and len(checkpoint.shape(name)) == 3
        and checkpoint.dtype(name) in FLOATS
        and "conv" not in name
    }


def _stored_linears(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Name of a module with a matrix -> local names of its tensors."""
    found: dict[str, list[str]] = {}
    for name in checkpoint.names:
        module, _, local = name.rpartition(".")
        found.setdefault(module, []).append(local)
    return {
        module: names
        for module, names in found.items()
        if "weight_packed" in names
        or ("weight" in names and len(checkpoint.shape(f"{module}.weight")) == 2)
    }


def _rows(checkpoint: Checkpoint, name: str) -> int:
    local = "weight" if f"{name}.weight" in checkpoint else "weight_packed"
    return checkpoint.shape(f"{name}.{local}")[0]


def block_of(name: str) -> str:
    """The first numbered part of a name, which is that of its decoder block."""
    parts = name.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else ""


class _AbsentPart(ValueError):
    """A quantised weight lacks what it cannot be read without."""


def _count(
    checkpoint: Checkpoint,
    name: str,
    local: Sequence[str],
    schemes: QuantizationConfig | None,
) -> Count | None:
    """
    :return: None of a format that is not known
    :raises _AbsentPart: if the files lack a part of it
    """
    alone = "weight_scale" not in local and "weight_packed" not in local
    if alone and checkpoint.dtype(f"{name}.weight") in FLOATS:
        return count_dense(checkpoint.pieces(f"{name}.weight"))
    scheme = None if schemes is None else _scheme_of(name, schemes)
    if scheme is None:
        return None
    assert schemes is not None
    form = str(scheme.format or schemes.format)
    wanted = ["weight_shape", "weight_scale"] if form == PACKED else ["weight_scale"]
    for part in wanted:
        if part not in local:
            raise _AbsentPart(
                f"{name}.{part} is in none of the files, without which its "
                "quantised weight says nothing: quantise again"
            )
    tensors = {
        one: checkpoint.read(f"{name}.{one}") for one in local if one.startswith("w")
    }
    return count_quantized(tensors, scheme, form)


def _scheme_of(name: str, schemes: QuantizationConfig) -> QuantizationScheme | None:
    """Of the first group whose targets match the name or the class."""
    linear = torch.nn.Linear(1, 1, device="meta")
    for scheme in schemes.config_groups.values():
        if isinstance(scheme, QuantizationScheme) and match_targets(
            name, linear, scheme.targets
        ):
            return scheme
    return None
