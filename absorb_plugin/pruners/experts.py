"""
By which names the experts of a mixture are saved. transformers 5 holds them in one
tensor, llm-compressor makes a Linear of each, and saves these by its own names: those
of Qwen's and DeepSeek's checkpoints. Of others (Mixtral's w1, w2 and w3; Granite's one
tensor) nobody would find them again, and random numbers would stand in their place.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from loguru import logger
from torch.nn import Module

from absorb_plugin._llmcompressor import (
    fused_experts,
    linear_experts,
    made_linear,
)

__all__ = [
    "check_packing",
    "in_one_tensor",
    "name_as_stored",
    "packed_experts",
    "to_be_packed",
]

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

_TO_BE_PACKED: ContextVar[bool] = ContextVar("to_be_packed", default=False)


def name_as_stored(model: Module) -> None:
    """
    Have `save_pretrained` give the experts' Linears the names of the model's own
    checkpoints; a warning where these have no Linears of single experts.
    """
    if not linear_experts(model) or _named_already(model):
        return
    names = _names_in_checkpoints(model)
    if not names:
        if _TO_BE_PACKED.get():
            return
        logger.warning(
            f"{type(model).__name__}: checkpoints of this model have all experts of a "
            "block in one tensor, and llm-compressor saves them one by one, which "
            "transformers reads as random numbers. `absorb prune` packs them; else "
            "leave output_dir out, and call model.save_pretrained within "
            "absorb_plugin.pruners.experts.packed_experts(model)"
        )
    elif any(own != stored for own, stored in names.items()):
        _rename(model, names)


def in_one_tensor(model: Module) -> bool:
    """Whether the model has experts, and they are stored so."""
    if not (fused_experts(model) or linear_experts(model)):
        return False  # transformers 4, which has no conversions, is not asked for them
    return not (_named_already(model) or _names_in_checkpoints(model))


@contextmanager
def packed_experts(model: Module) -> Iterator[None]:
    """Within, experts are in one tensor, as they were before llm-compressor."""
    linear: dict[str, Any] = dict(linear_experts(model))
    try:
        for name, module in linear.items():
            model.set_submodule(name, _packed(module))
        yield
    finally:
        for name, module in linear.items():
            model.set_submodule(name, module)


@contextmanager
def to_be_packed() -> Iterator[None]:
    """Within, nobody needs to be told of experts in one tensor."""
    token = _TO_BE_PACKED.set(True)
    try:
        yield
    finally:
        _TO_BE_PACKED.reset(token)


def check_packing(model: Module) -> None:
    """
    To be asked before minutes are spent on a model that is saved with `packed_experts`.

    :raises ValueError: if its experts would not come back
    """
    linear = next(iter(linear_experts(model).values()), None)
    if linear is None:
        fused = next(iter(fused_experts(model).values()))
        linear = made_linear(fused, getattr(fused, "config", model.config))
    _packed(linear)  # the others are alike


@torch.no_grad()
def _packed(linear: Any) -> Module:
    """
    Experts in one tensor. llm-compressor puts gate and up side by side, also where the
    model has them in turn (gpt-oss), so what it would make of the result is looked at.

    :raises ValueError: if that is not what is there
    """
    if not hasattr(linear, "to_experts_module"):
        raise ValueError(
            f"{type(linear).__name__}: the experts of this model are stored in one "
            "tensor, into which llm-compressor puts them again from 0.14 on. Install "
            "that, or the pruned model could not be saved"
        )
    fused = linear.to_experts_module()
    if _same(linear, fused):
        return fused
    for name in ("gate_up_proj", "gate_up_proj_bias"):
        if isinstance(both := getattr(fused, name, None), torch.Tensor):
            dim = 1 if both.dim() == 3 and not fused.is_transposed else -1
            both.copy_(_in_turn(both, dim))
    if _same(linear, fused):
        return fused
    raise ValueError(
        f"{type(fused).__name__}: llm-compressor made Linears of these experts, and "
        "they cannot be put into one tensor again, as which transformers reads them: "
        "the pruned model could not be saved"
    )


def _in_turn(halves: torch.Tensor, dim: int) -> torch.Tensor:
    """The first of one half, the first of the other, and so on."""
    one, other = halves.chunk(2, dim)
    dim %= halves.dim()
    return torch.stack((one, other), dim + 1).flatten(dim, dim + 1)


def _same(linear: Any, fused: Module) -> bool:
    again = made_linear(fused, linear._source_config)
    return all(
        torch.equal(one, other)
        for one, other in zip(linear.parameters(), again.parameters(), strict=True)
    )


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
