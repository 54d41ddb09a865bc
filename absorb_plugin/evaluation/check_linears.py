"""Zeros of every Linear of a checkpoint, beside what its recipe planned."""

from collections.abc import Iterable, Mapping, Sequence

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
        names, packed = _match(checkpoint, skeleton, plan, stored, report)
    try:
        counted = _count_stored(checkpoint, names, stored, plan, schemes)
    except _AbsentPart as error:
        (tensor,) = error.args
        report.absent(
            f"{tensor} is in none of the files, without which its quantised weight "
            "says nothing: quantise again",
            [tensor],
        )
        return
    except _UnknownFormat as error:
        report.warnings.append(
            f"the weights of {error} are in no format that this check knows: zeros are "
            "not counted"
        )
        return
    report.linears |= counted | _count_packed(checkpoint, packed)


def _match(
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel,
    plan: Mapping[str, float],
    stored: Iterable[str],
    report: CheckReport,
) -> tuple[dict[str, str], dict[str, float]]:
    """
    Name of a Linear in the model -> in the files; and `_packed_experts`. The report
    takes what of the plan is in neither.
    """
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
        report.absent(
            f"{len(absent)} Linears of recipe.yaml are not in the files, "
            f"{absent[0]} for one: transformers puts random numbers in their place. "
            "Save the model anew, or copy the files that belong together",
            [f"{name}.weight" for name in absent],
        )
    return names, packed


def _count_stored(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    stored: Mapping[str, Sequence[str]],
    plan: Mapping[str, float],
    schemes: QuantizationConfig | None,
) -> dict[str, LinearZeros]:
    """
    By name in the files.

    :param names: in the model -> in the files
    :param stored: name in the files -> local names of its tensors
    :raises _AbsentPart, _UnknownFormat: as `_count`
    """
    found: dict[str, LinearZeros] = {}
    bar = tqdm(names.items(), desc="Counting zeros", unit="Linear", leave=False)
    for name, saved in bar:
        count = _count(checkpoint, saved, stored[saved], schemes)
        columns = max(1, count.weights // max(1, _rows(checkpoint, saved)))
        planned = plan.get(name)
        found[saved] = LinearZeros(block_of(saved), count, columns, planned)
    return found


def _count_packed(
    checkpoint: Checkpoint, packed: Mapping[str, float]
) -> dict[str, LinearZeros]:
    """:param packed: from `_packed_experts`"""
    return {
        name: LinearZeros(
            block_of(name),
            count_dense(checkpoint.pieces(name)),
            min(checkpoint.shape(name)[1:]),
            share,
        )
        for name, share in packed.items()
    }


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


class _AbsentPart(Exception):
    """Of a tensor, by name, without which a quantised weight cannot be read."""


class _UnknownFormat(Exception):
    """Of a Linear, by its name in the files."""


def _count(
    checkpoint: Checkpoint,
    name: str,
    local: Sequence[str],
    schemes: QuantizationConfig | None,
) -> Count:
    """
    :raises _AbsentPart: if the files lack a part of it
    :raises _UnknownFormat: if it is in no format that is known
    """
    alone = "weight_scale" not in local and "weight_packed" not in local
    if alone and checkpoint.dtype(f"{name}.weight") in FLOATS:
        return count_dense(checkpoint.pieces(f"{name}.weight"))
    scheme = None if schemes is None else _scheme_of(name, schemes)
    if scheme is None:
        raise _UnknownFormat(name)
    assert schemes is not None
    form = str(scheme.format or schemes.format)
    wanted = ["weight_shape", "weight_scale"] if form == PACKED else ["weight_scale"]
    for part in wanted:
        if part not in local:
            raise _AbsentPart(f"{name}.{part}")
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
