"""
By which names the experts of a mixture are saved. transformers 5 holds them in one
tensor, llm-compressor makes a Linear of each, and saves these by its own names: those
of Qwen's and DeepSeek's checkpoints. Of others (Mixtral's w1, w2 and w3; Granite's one
tensor) nobody would find them again, and random numbers would stand in their place.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loguru import logger
from torch.nn import Module

from absorb_plugin._llmcompressor import fused_experts, linear_experts

__all__ = ["in_one_tensor", "name_as_stored", "packed_experts"]

# What transformers holds of all experts -> the Linears that an expert has of it.
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
TARGET = re.compile(rf"experts\.({'|'.join(FUSED)})$")
SOURCE = re.compile(r"experts\.\*\.(\w+)\.weight$")
# As of a model that was loaded within llm-compressor's `load_quantizable_moe`.
NUMBERED = r".experts.\1."


def name_as_stored(model: Module) -> None:
    """
    Have `save_pretrained` give the experts' Linears the names of the model's own
    checkpoints; a warning where these have no Linears of single experts.
    """
    if not linear_experts(model) or _named_already(model):
        return
    names = _names_in_checkpoints(model)
    if not names:
        logger.warning(
            f"{type(model).__name__}: checkpoints of this model have all experts of a "
            "block in one tensor, and llm-compressor saves them one by one, which "
            "transformers reads as random numbers. `absorb prune` packs them; else "
            "leave output_dir out, and call llmcompressor.modeling.moe.linearize."
            "repack_moe(model) before model.save_pretrained"
        )
    elif any(own != stored for own, stored in names.items()):
        _rename(model, names)


def in_one_tensor(model: Module) -> bool:
    """Whether the model has experts, and they are stored so."""
    if _named_already(model) or not (fused_experts(model) or linear_experts(model)):
        return False
    return not _names_in_checkpoints(model)


@contextmanager
def packed_experts(model: Module) -> Iterator[None]:
    """Within, experts are in one tensor, as they were before llm-compressor."""
    linear: dict[str, Any] = dict(linear_experts(model))
    try:
        for name, module in linear.items():
            model.set_submodule(name, module.to_experts_module())
        yield
    finally:
        for name, module in linear.items():
            model.set_submodule(name, module)


def _names_in_checkpoints(model: Module) -> dict[str, str]:
    """
    Name of an expert's Linear -> in the files that transformers reads; empty where
    these have experts in one tensor.
    """
    names: dict[str, str] = {}
    for conversion in _conversions(model):
        for target in map(TARGET.search, conversion.target_patterns):
            if target is None:
                continue
            found = list(map(SOURCE.search, conversion.source_patterns))
            if None in found:
                return {}
            stored = [one[1] for one in found if one is not None]
            names |= dict(zip(FUSED[target[1]], stored, strict=False))
    return names if "down_proj" in names else {}


def _rename(model: Any, names: dict[str, str]) -> None:
    from transformers.core_model_loading import WeightRenaming

    kept = [
        conversion
        for conversion in _conversions(model)
        if not any(map(TARGET.search, conversion.target_patterns))
    ]
    # it is the way from the files to the model, which saving goes back
    own = [
        WeightRenaming(
            source_patterns=rf"\.experts\.(\d+)\.{stored}\.",
            target_patterns=rf".experts.\1.{name}.",
        )
        for name, stored in names.items()
    ]
    model._weight_conversions = [*kept, *own]


def _named_already(model: Module) -> bool:
    targets = [x for one in _conversions(model) for x in one.target_patterns]
    return any(NUMBERED in target for target in targets)


def _conversions(model: Module) -> list[Any]:
    """What transformers changes on the way from the files to the model."""
    own = getattr(model, "_weight_conversions", None)
    if own is not None:
        return list(own)
    from transformers.conversion_mapping import get_model_conversion_mapping

    # of one that was not loaded `save_pretrained` takes the same, but for prefixes
    found = get_model_conversion_mapping(model, add_legacy=False)
    return [one for one in found if type(one).__name__ != "PrefixChange"]
