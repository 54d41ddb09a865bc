"""
By which names the experts of a mixture are saved. transformers 5 holds them in one
tensor, llm-compressor makes a Linear of each, and saves these by its own names: those
of Qwen's and DeepSeek's checkpoints. Of others (Mixtral's w1, w2 and w3; Granite's one
tensor) nobody would find them again, and random numbers would stand in their place.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from compressed_tensors.offload import (
    disable_onloading,
    update_offload_parameter,
)
from compressed_tensors.offload.convert import from_accelerate
from llmcompressor.transformers.compression.compressed_tensors_utils import (
    modify_save_pretrained,
)
from loguru import logger
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin._llmcompressor import (
    fused_experts,
    linear_experts,
    made_linear,
)
from absorb_plugin.torch_state import stored

__all__ = [
    "check_packing",
    "name_as_stored",
    "packed_experts",
    "warn_of_packing",
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


def name_as_stored(model: Any) -> None:
    """
    Have `save_pretrained` write experts as the model's own checkpoints have them:
    by the names there, or packed where these have no Linears of single experts.
    """
    if _in_one_tensor(model):
        if not isinstance(model.save_pretrained, _SavePacked):
            model.save_pretrained = _SavePacked(model)
    elif _has_experts(model) and not _named_already(model):
        names = _names_in_checkpoints(model)
        if any(own != stored for own, stored in names.items()):
            _rename(model, names)


class _SavePacked:
    """
    `model.save_pretrained`, with experts in one tensor while it runs. An object that
    has the model, so that a deep copy of the model has one of its own: llm-compressor's
    wrapper is a function, of which there is no copy, and saves the model that it was
    made for. So it is made anew each time.
    """

    __wrapped__: Any
    _overridden = True  # llm-compressor's mark: another `oneshot` leaves it as it is

    def __init__(self, model: Any) -> None:
        saving = model.save_pretrained
        self.model = model
        # of llm-compressor's wrapper what it calls
        wrapped = hasattr(saving, "_overridden")
        update_wrapper(self, saving.__wrapped__ if wrapped else saving.__func__)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        model = self.model
        quantized = _is_quantized(model)
        if quantized:
            logger.warning(
                f"{type(model).__name__}: checkpoints of this model have all experts "
                "of a block in one tensor. Of a quantised model llm-compressor saves "
                "them one by one, which transformers reads as random numbers"
            )
        model.save_pretrained = MethodType(self.__wrapped__, model)
        modify_save_pretrained(model)
        try:
            # before llm-compressor offloads the model for accelerate
            with nullcontext() if quantized else packed_experts(model):
                model.save_pretrained(*args, **kwargs)
        finally:
            model.save_pretrained = self


@contextmanager
def packed_experts(model: Module) -> Iterator[None]:
    """
    Within, experts are in one tensor, as they were before llm-compressor, and their
    Linears are empty, which saves the memory of holding both.

    :raises ValueError: if they would not come back
    """
    linear: dict[str, Any] = dict(linear_experts(model))
    packed: dict[str, Module] = {}
    try:
        for name, module in linear.items():
            packed[name] = _packed(module)
            model.set_submodule(name, packed[name])
            _empty(module)
        yield
    finally:
        try:
            if any(hasattr(module, "_hf_hook") for module in model.modules()):
                from_accelerate(model)  # as llm-compressor does unless saving failed
        finally:
            while packed:
                name, fused = packed.popitem()
                _fill(linear[name], fused)
                model.set_submodule(name, linear[name])


def warn_of_packing(model: Module) -> None:
    """Where `check_packing` refuses; nobody may want to save the model."""
    try:
        check_packing(model)
    except ValueError as error:
        logger.warning(f"{error}, neither by output_dir nor by save_pretrained")


def check_packing(model: Module) -> None:
    """
    To be asked before minutes are spent on a model that is to be saved.

    :raises ValueError: if its experts are stored in one tensor, and would not come back
    """
    if not _in_one_tensor(model):
        return
    linear = next(iter(linear_experts(model).values()), None)
    if linear is None:
        fused = next(iter(fused_experts(model).values()))
        linear = made_linear(fused, getattr(fused, "config", model.config))
    _packed(linear)  # the others are alike


def _has_experts(model: Module) -> bool:
    return bool(fused_experts(model) or linear_experts(model))


def _in_one_tensor(model: Module) -> bool:
    """Whether the model has experts, and they are stored so."""
    # transformers 4, which has no conversions, is not asked for them
    return _has_experts(model) and not (
        _named_already(model) or _names_in_checkpoints(model)
    )


def _is_quantized(model: Module) -> bool:
    """Of such experts transformers and vLLM differ in what they read."""
    return any(getattr(one, "quantization_scheme", None) for one in model.modules())


def _weights(experts: Module) -> list[torch.Tensor]:
    """As they lie."""
    found = [x for one in experts.modules() for x in stored(one._parameters).values()]
    return [x for x in found if x is not None]


def _is_shared(weight: torch.Tensor) -> bool:
    """On disk, or in memory that processes may share."""
    return weight.is_meta or (weight.device.type == "cpu" and weight.is_shared())


def _empty(experts: Module) -> None:
    """Give back their memory, unless they are on disk or processes share them."""
    for weight in _weights(experts):
        if not _is_shared(weight):
            weight.data = weight.new_tensor(torch.nan).expand(weight.shape)


@torch.no_grad()
def _fill(linear: Any, fused: Module) -> None:
    """Undo `_empty`; `_packed` has seen that the weights are these."""
    empty = [weight for weight in _weights(linear) if not any(weight.stride())]
    for weight in empty:
        weight.data = weight.new_empty(weight.shape)
    with disable_onloading():
        for index in range(linear.num_experts if empty else 0):
            linear[index].copy_from_experts_module(fused, index)


def _packed(linear: Any) -> Module:
    """As `_packed_by`; of ranks that share weights, all fail where one does."""
    if not any(map(_is_shared, _weights(linear))):
        return _packed_by(linear, shared=False)
    with distributed.fail_together():
        return _packed_by(linear, shared=True)


@torch.no_grad()
def _packed_by(linear: Any, shared: bool) -> Module:
    """
    Experts in one tensor. llm-compressor puts gate and up side by side, also where the
    model has them in turn (gpt-oss), so what it would make of the result is looked at.

    :param shared: whether ranks share the weights
    :raises ValueError: if that is not what is there
    """
    if not hasattr(linear, "to_experts_module"):
        raise ValueError(
            f"{type(linear).__name__}: the experts of this model are stored in one "
            "tensor, into which llm-compressor puts them again from 0.14 on. Install "
            "that, or the pruned model could not be saved"
        )
    try:
        fused = linear.to_experts_module()
    except Exception as error:  # Llama 4's do not know what they were made of
        raise ValueError(
            f"{type(linear).__name__}: llm-compressor cannot put the Linears that it "
            f"made of these experts into one tensor again ({error}), as which "
            "transformers reads them: the pruned model could not be saved"
        ) from error
    if _same(linear, fused):
        return fused
    turned: dict[str, torch.Tensor] = {}
    for name in ("gate_up_proj", "gate_up_proj_bias"):
        if isinstance(both := getattr(fused, name, None), torch.Tensor):
            dim = 1 if both.dim() == 3 and not fused.is_transposed else -1
            turned[name] = _in_turn(both, dim)
    if shared:  # all have looked, or some would turn what others have turned
        distributed.meet()
    for name, both in turned.items():
        update_offload_parameter(fused, name, both)
    if shared:
        distributed.meet()
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
