"""
What to know of a pruned checkpoint before it is served: `absorb check`.

The files are read tensor by tensor and the model is not loaded, so a checkpoint of any
size is checked in little memory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from pydantic import ValidationError
from transformers import PreTrainedModel

from absorb_plugin.evaluation.check_linears import FLOATS, block_of, count_linears
from absorb_plugin.evaluation.check_report import (
    CheckReport,
    LinearZeros,
    planned_share,
    zero_share,
)
from absorb_plugin.evaluation.check_shapes import check_absent, check_shapes
from absorb_plugin.evaluation.plan import (
    loading_info,
    make_skeleton,
    pruned_linears,
    read_modifiers,
)
from absorb_plugin.evaluation.shards import Checkpoint
from absorb_plugin.evaluation.zeros import count_dense
from absorb_plugin.mistakes import in_one_line, in_words
from absorb_plugin.other_modifiers import DESTROYS_ZEROS

__all__ = ["check_checkpoint"]

# A block may miss its plan by this share of its weights, and by the rounding of a row.
TOLERANCE = 0.005
# Below this part of its plan a Linear was not pruned at all. Not zero: a model that was
# once quantised has some zeros of its own.
DENSE = 0.2

# Linears that their block does not call, as `dt_proj` of Mamba's mixers, are a few
# percent of its weights. More were not pruned.
UNCALLED = 0.1

# Without being pruned a Linear may have this share of zeros; where it is quantised,
# by rounding: 4 bits make zeros of a seventh of normal weights, and of more where
# outliers widen the scale.
OWN_ZEROS, OWN_ZEROS_8_BITS, OWN_ZEROS_4_BITS = 0.05, 0.1, 0.5

HEAD_WEIGHTS = ("weight", "weight_packed", "qweight")


def check_checkpoint(directory: Path, load: bool = False) -> CheckReport:
    """
    :param directory: a saved model
    :param load: also load it with transformers, which takes its memory
    :raises OSError, ValueError: if it cannot be read; see `Checkpoint`
    """
    checkpoint = Checkpoint(directory)
    schemes, warnings = _schemes(checkpoint.config)
    report = _describe(checkpoint, schemes)
    report.warnings += warnings
    _check_config(checkpoint, report)
    skeleton = _skeleton(checkpoint, report)
    plan = _plan(checkpoint, skeleton, report)
    count_linears(checkpoint, skeleton, plan, schemes, report)
    _check_head(checkpoint, skeleton, report)
    check_shapes(checkpoint, skeleton, report)
    _check_rest(checkpoint, report)
    _check_plan(report)
    if load:
        report.loads = _load(directory, report)
    else:
        check_absent(checkpoint, skeleton, report)
    return report


def _describe(
    checkpoint: Checkpoint, schemes: QuantizationConfig | None
) -> CheckReport:
    config = checkpoint.config
    text = config.get("text_config") or config
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    return CheckReport(
        checkpoint.directory,
        str(config.get("model_type", "unknown")),
        checkpoint.bytes,
        checkpoint.files,
        str(dtype),
        bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        _quantization(_saved_quantization(config), schemes),
    )


def _saved_quantization(config: Mapping[str, Any]) -> Any:
    return config.get("quantization_config") or config.get("compression_config")


def _quantization(
    saved: Any, schemes: QuantizationConfig | None
) -> dict[str, Any] | None:
    if not saved:
        return None
    if not isinstance(saved, Mapping):  # of which a warning tells
        return {"method": None, "format": None, "bits": []}
    groups = schemes.config_groups.values() if schemes else ()
    bits = {getattr(getattr(group, "weights", None), "num_bits", 0) for group in groups}
    bits.add(saved.get("bits"))  # of GPTQ and AWQ
    layout = saved.get("format")
    return {
        "method": saved.get("quant_method"),
        "format": layout if isinstance(layout, str) else None,
        "bits": sorted(bit for bit in bits if isinstance(bit, int) and bit > 0),
    }


def _check_config(checkpoint: Checkpoint, report: CheckReport) -> None:
    config = checkpoint.config
    places: dict[str, Mapping[str, Any]] = {"config.json": config}
    for name in ("quantization_config", "compression_config"):
        values = config.get(name)
        if isinstance(values, Mapping):
            places[f"{name} of config.json"] = values
    for place, values in places.items():
        if values.get("sparsity_config"):
            report.problems.append(
                f"{place} has a `sparsity_config`, which vLLM refuses since 0.24 "
                "(of weights that are stored dense as well). "
                + _sparsity_remedy(values["sparsity_config"])
            )
    stored = {
        checkpoint.dtype(name)
        for name in checkpoint.names
        if name.endswith(("norm.weight", "embed_tokens.weight"))
    }
    expected = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    if stored and report.dtype in expected and expected[report.dtype] not in stored:
        report.warnings.append(
            f"config.json says {report.dtype}, the files hold {', '.join(stored)}"
        )
    if checkpoint.unread_index:
        report.warnings.append(
            f"there are model.safetensors and {checkpoint.unread_index.name}: "
            "transformers reads the first, and so does this check; vLLM reads the "
            "files that the second names. Delete what is of an earlier save"
        )


def _sparsity_remedy(config: Mapping[str, Any]) -> str:
    if config.get("format") == "dense":
        return "Its weights are stored dense: delete the field"
    return (
        f"Its format is {config.get('format')!r}: save the model anew with "
        "llm-compressor 0.11 or newer, which stores weights dense"
    )


def _skeleton(checkpoint: Checkpoint, report: CheckReport) -> PreTrainedModel | None:
    try:
        skeleton = make_skeleton(checkpoint.directory)
        ends = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
        # config.json may leave the default of its class out
        report.tied = None not in ends and ends[0].weight is ends[1].weight
    except Exception as error:  # transformers raises anything for what it lacks
        report.warnings.append(
            f"transformers {transformers.__version__} cannot build this model "
            f"({in_one_line(error)}), so its zeros are not compared with "
            "recipe.yaml"
        )
        return None
    return skeleton


def _plan(
    checkpoint: Checkpoint, skeleton: PreTrainedModel | None, report: CheckReport
) -> dict[str, float]:
    """Full name of a Linear of the model -> planned share of zeros."""
    path = checkpoint.directory / "recipe.yaml"
    if not path.is_file():
        report.warnings.append("no recipe.yaml: there is no plan to compare with")
        return {}
    try:
        modifiers = read_modifiers(path)
    except ValueError as error:
        report.problems.append(str(error))
        return {}
    lost = [name for name, _ in modifiers if name in DESTROYS_ZEROS]
    if lost:
        report.warnings.append(f"{lost[0]} in recipe.yaml makes pruned weights nonzero")
    if any(name == "AbsorptionAllocationModifier" for name, _ in modifiers):
        report.warnings.append(
            "recipe.yaml still has an AbsorptionAllocationModifier: it is the recipe "
            "that went in, and what it came to is not known"
        )
        return {}
    if skeleton is None:
        return {}
    try:
        plan = pruned_linears(modifiers, skeleton)
    except ValueError as error:
        report.problems.append(str(error))
        return {}
    if not plan:
        report.warnings.append("recipe.yaml has no modifier that prunes weights")
    return plan


def _schemes(
    config: Mapping[str, Any],
) -> tuple[QuantizationConfig | None, list[str]]:
    """
    None where there are none, or of another method than ours; and warnings of what is
    not understood.
    """
    saved = _saved_quantization(config)
    if not saved:
        return None, []
    if not isinstance(saved, Mapping):
        return None, [f"config.json: quantization_config={saved!r} is no object"]
    if not saved.get("config_groups"):
        return None, []
    known = QuantizationConfig.model_fields.keys()
    try:
        fields = {key: value for key, value in saved.items() if key in known}
        return QuantizationConfig.model_validate(fields), []
    except ValidationError as error:
        reason = in_words(error, known)
    except Exception as error:  # its validators raise of any kind
        reason = in_one_line(error)
    return None, [f"the quantisation in config.json is not understood: {reason}"]


def _check_head(
    checkpoint: Checkpoint, skeleton: PreTrainedModel | None, report: CheckReport
) -> None:
    head, embedding = _end_names(skeleton)
    if report.tied:
        if f"{head}.weight" in checkpoint and f"{embedding}.weight" in checkpoint:
            one = checkpoint.read(f"{head}.weight")
            if not torch.equal(one, checkpoint.read(f"{embedding}.weight")):
                report.problems.append(
                    "config.json ties the output head to the embeddings, and the files "
                    "hold two that differ: set `tie_word_embeddings` to false, or the "
                    "head is lost"
                )
    elif skeleton is not None and not _has_head(checkpoint, skeleton):
        report.absent(
            f"config.json does not tie the output head, and {head}.weight is in none "
            "of the files: it would be made up at random. If the model was tied, set "
            "`tie_word_embeddings` to true",
            [f"{head}.weight"],
        )
    for name in (head, embedding):
        if f"{name}.weight" in checkpoint:
            share = count_dense(checkpoint.pieces(f"{name}.weight")).share
            if share > 0.05:
                report.warnings.append(
                    f"{share:.1%} of {name} are zero: pruners ignore it by "
                    '`ignore: ["re:.*lm_head"]` alone'
                )


def _has_head(checkpoint: Checkpoint, skeleton: PreTrainedModel) -> bool:
    """Under its own name, or another (`embed_out`) with its shape."""
    head, embedding = _end_names(skeleton)
    module = skeleton.get_output_embeddings()
    if module is None or any(f"{head}.{x}" in checkpoint for x in HEAD_WEIGHTS):
        return True
    return any(
        checkpoint.shape(name) == tuple(module.weight.shape)
        for name in checkpoint.names
        if not block_of(name) and name != f"{embedding}.weight"
    )


def _end_names(skeleton: PreTrainedModel | None) -> tuple[str, str]:
    """Names of output head and embeddings, empty where there is none."""
    if skeleton is None:
        return "", ""
    names = {id(module): name for name, module in skeleton.named_modules()}
    head, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    return names.get(id(head), ""), names.get(id(embedding), "")


def _check_rest(checkpoint: Checkpoint, report: CheckReport) -> None:
    """NaN and infinity, in the Linears counted and in all other tensors."""
    broken = [name for name, one in report.linears.items() if not one.count.finite]
    for name in checkpoint.names:
        if {name, name.rpartition(".")[0]} & report.linears.keys():
            continue
        dense = checkpoint.dtype(name) in FLOATS
        if dense and not count_dense(checkpoint.pieces(name)).finite:
            broken.append(name)
    if broken:
        report.problems.append(
            f"{len(broken)} tensors hold NaN or infinity, {broken[0]} for one: prune "
            "again, in a wider dtype if it was float16"
        )


def _check_plan(report: CheckReport) -> None:
    empty = [
        name
        for name, one in report.linears.items()
        if one.count.zeros == one.count.weights and (one.planned or 0) < 1
    ]
    if empty:
        report.problems.append(
            f"{len(empty)} Linears have no weight left, {empty[0]} for one: an expert "
            "that saw no calibration token, or weights that were not loaded"
        )
    dense = _left_dense(report)
    if dense:
        report.warnings.append(
            f"{len(dense)} Linears of the plan were left dense, {dense[0]} for one, as "
            "the pruner leaves those that their block does not call"
        )
    for name, linears in report.blocks().items():
        told = _beyond_plan(name, [x for x in linears if x.planned is not None], report)
        if told:
            report.problems.append(told)
    unplanned = [
        name
        for name, one in report.linears.items()
        if one.planned is None and one.count.share > _own_zeros(report)
    ]
    if unplanned and report.planned is not None:
        report.warnings.append(
            f"{len(unplanned)} Linears have zeros and are not in the plan, "
            f"{unplanned[0]} for one"
        )


def _own_zeros(report: CheckReport) -> float:
    bits = min(report.quantization["bits"], default=16) if report.quantization else 16
    if bits > 8:
        return OWN_ZEROS
    return OWN_ZEROS_8_BITS if bits == 8 else OWN_ZEROS_4_BITS


def _left_dense(report: CheckReport) -> list[str]:
    """Planned and not pruned, in blocks where others are."""
    pruned = {
        one.block
        for one in report.linears.values()
        if one.planned and not _is_dense(one)
    }
    return [
        name
        for name, one in report.linears.items()
        if _is_dense(one) and one.block in pruned
    ]


def _is_dense(linear: LinearZeros) -> bool:
    planned = linear.planned or 0
    # of every row Wanda takes so many whole weights, and may take none
    return planned * linear.columns >= 1 and linear.count.share < DENSE * planned


def _beyond_plan(
    name: str, linears: list[LinearZeros], report: CheckReport
) -> str | None:
    pruned = [one for one in linears if not _is_dense(one)]
    weights, all_weights = (
        sum(one.count.weights for one in some) for some in (pruned, linears)
    )
    compared = pruned if weights >= (1 - UNCALLED) * all_weights else linears
    share, planned = zero_share(compared), planned_share(compared)
    if share is None or planned is None:
        return None
    rows = sum(one.count.weights / one.columns for one in compared)
    slack = TOLERANCE + rows / sum(one.count.weights for one in compared)
    if share < planned - slack:
        return f"block {name} has {share:.4f} zeros, planned are {planned:.4f}"
    if share > planned + slack and report.format is None:  # rounding makes more
        return f"block {name} has {share:.4f} zeros, planned are only {planned:.4f}"
    return None


def _load(directory: Path, report: CheckReport) -> bool:
    try:
        info = loading_info(directory)
    except Exception as error:  # of any kind: that is what was asked
        report.problems.append(f"transformers does not load it: {in_one_line(error)}")
        return False
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(what) or ())):
            report.problems.append(
                f"transformers finds {len(names)} {what.replace('_', ' ')}, "
                f"{names[0]} for one, and makes those weights up at random"
            )
            return False
    return True
