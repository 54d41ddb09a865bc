"""
Where the hidden state lies in what a block takes and in what it returns: blocks of
remote code name their input as they like, and return it in any container.
"""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch.nn import Module
from transformers.cache_utils import Cache

__all__ = [
    "BlockCall",
    "hidden_state",
    "hollow",
    "put_hidden_state",
    "without_cache_arguments",
]

USUAL = "hidden_states"
# What else blocks call it, where there are several tensors of three dimensions.
NAMES = {USUAL, "hidden_state", "hidden", "x", "h", "inputs", "input", "inputs_embeds"}
# Arguments that hold an attention bias, with entries for every head.
BIAS = re.compile("alibi|bias")
HEADS = ("num_heads", "num_attention_heads", "n_heads")
CACHES = {"past_key_value", "past_key_values", "layer_past", "cache_params", "cache"}


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """
    The arguments of a block's call, one of which is the hidden state.

    :param args: positional arguments
    :param kwargs: keyword arguments
    :param key: position or name of the hidden state
    """

    args: tuple
    kwargs: Mapping[str, Any]
    key: int | str

    @classmethod
    def of(cls, block: Module, args: tuple, kwargs: Mapping[str, Any]) -> "BlockCall":
        """
        :raises ValueError: naming the block's class, if no argument is a hidden state
        """
        named = [(USUAL, kwargs[USUAL])] if USUAL in kwargs else []
        places: list[tuple[int | str, Any]] = [*enumerate(args), *named]
        places += kwargs.items()
        tensors = [(key, value) for key, value in places if _is_float(value)]
        if not tensors:
            given = [f"argument {i}" for i in range(len(args))] + list(kwargs)
            raise ValueError(
                f"model: the block class {type(block).__name__} is called without a "
                f"hidden state: none of {given} is a tensor of floats. Blocks that "
                "take it in a container are not supported; use strength: 0 and an "
                "allocator that needs no activations"
            )
        shaped = [key for key, x in tensors if x.dim() == 3] or [tensors[0][0]]
        if len(shaped) > 1:
            names: dict[int | str, str] = dict(enumerate(_parameters(block)))
            shaped.sort(key=lambda key: names.get(key, key) not in NAMES)
        return cls(args, kwargs, shaped[0])

    @property
    def hidden(self) -> torch.Tensor:
        """(batch, tokens, hidden)"""
        if isinstance(self.key, int):
            return self.args[self.key]
        return self.kwargs[self.key]

    def put(self, hidden: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        """Positional and keyword arguments with another hidden state."""
        if isinstance(self.key, str):
            return self.args, {**self.kwargs, self.key: hidden}
        args = (*self.args[: self.key], hidden, *self.args[self.key + 1 :])
        return args, dict(self.kwargs)

    def of_samples(self, part: slice, block: Module) -> "BlockCall":
        """
        The call for some of the samples.

        :param block: that is called
        """
        samples, tokens = self.hidden.shape[:2]
        names, heads = _parameters(block), _heads(block)

        def cut(name: object, value: Any) -> Any:
            is_bias = isinstance(value, torch.Tensor) and BIAS.search(str(name))
            if is_bias and heads and value.dim() > 1:
                bias = _cut_bias(part, samples, heads, value)
                if bias is not None:
                    return bias
            return _cut(part, samples, tokens, value)

        named = [*names, *range(len(names), len(self.args))]
        args = tuple(map(cut, named, self.args))
        kwargs = {name: cut(name, value) for name, value in self.kwargs.items()}
        return BlockCall(args, kwargs, self.key)


def _parameters(block: Module) -> list[str]:
    """Names of what its forward takes; none where they cannot be read."""
    try:
        return [*signature(block.forward).parameters]
    except (TypeError, ValueError):
        return []


def _cut_bias(
    part: slice, samples: int, heads: int, value: torch.Tensor
) -> torch.Tensor | None:
    """
    The part of an attention bias of every head, shape (heads, ...) or (samples * heads,
    ...); None for one that begins with the samples.
    """
    if len(value) == heads and value.dim() == 3:  # as MPT's
        return value
    if len(value) == samples * heads:  # as Bloom's
        return value.unflatten(0, (samples, heads))[part].flatten(0, 1)
    return None


def _cut(part: slice, samples: int, tokens: int, value: Any) -> Any:
    """The part of whatever has entries for every sample; positions may have none."""
    cut = partial(_cut, part, samples, tokens)
    if isinstance(value, dict):
        return {key: cut(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(map(cut, value))
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return value
    first, second, *others = value.shape
    if first == samples:
        return value[part]
    if first == 3 and second == samples and others[:1] == [tokens]:
        return value[:, part]  # positions in time, height and width
    return value


def _heads(block: Module) -> int:
    """Number of attention heads; 0 where the block does not say."""
    return next(
        (
            number
            for module in block.modules()
            for name in HEADS
            if isinstance(number := getattr(module, name, None), int)
        ),
        0,
    )


def without_cache_arguments(
    args: tuple, kwargs: Mapping[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """
    The same arguments without a key-value cache: a block that runs again would read the
    keys of other trajectories in it.
    """
    named = {
        name: None if name in CACHES or _is_cache(value) else value
        for name, value in kwargs.items()
    }
    if named.get("use_cache"):
        named["use_cache"] = False
    return tuple(None if _is_cache(value) else value for value in args), named


def hidden_state(output: object, block: Module | None = None) -> torch.Tensor:
    """
    The hidden state among what a block returns: itself, or the first tensor of floats.

    :raises ValueError: naming the block's class, if there is none
    """
    for _, value in _entries(output):
        if _is_float(value):
            return value
    name = "a block" if block is None else type(block).__name__
    raise ValueError(
        f"model: {name} returns {type(output).__name__} without a hidden state: "
        "expected a tensor of floats, or a container that holds one"
    )


def put_hidden_state(output: object, hidden: torch.Tensor | None) -> Any:
    """What a block returned, with another hidden state in its place."""
    for key, value in _entries(output):
        if _is_float(value):
            return _put(output, {key: hidden})
    return hidden


def hollow(output: object) -> Any:
    """
    What a block returned, with an empty tensor for the hidden state and None for all
    other tensors: what the model's own code unpacks, without the memory.
    """
    tensors = [(k, v) for k, v in _entries(output) if isinstance(v, torch.Tensor)]
    hidden = hidden_state(output)
    return _put(
        output, {key: v.new_empty(0) if v is hidden else None for key, v in tensors}
    )


def _entries(output: object) -> Iterator[tuple[Any, Any]]:
    """Places of a container and what lies there; a tensor lies at None."""
    if isinstance(output, torch.Tensor):
        return iter([(None, output)])
    if isinstance(output, Mapping):
        return iter(output.items())
    if isinstance(output, tuple | list):
        return iter(enumerate(output))
    if dataclasses.is_dataclass(output):
        return iter(vars(output).items())
    return iter([])


def _put(output: Any, values: Mapping[Any, Any]) -> Any:
    if isinstance(output, torch.Tensor):
        return values[None]
    if isinstance(output, Mapping):
        return type(output)(**{**output, **values})
    if isinstance(output, tuple | list):
        entries = [values.get(i, value) for i, value in enumerate(output)]
        named = hasattr(output, "_fields")
        return type(output)(*entries) if named else type(output)(entries)
    changed = copy.copy(output)
    vars(changed).update(values)
    return changed


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_cache(value: object) -> bool:
    return isinstance(value, Cache) or "cache" in type(value).__name__.lower()
