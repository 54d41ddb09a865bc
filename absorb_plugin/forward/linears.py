"""Blocks that compute with other weights than their own, one Linear at a time."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import Linear, Module
from torch.nn.functional import linear as apply_linear

from absorb_plugin.forward.replaced import replaced_forward

__all__ = [
    "Weights",
    "all_given",
    "differentiated",
    "ignore_entry",
    "replaced_weights",
    "watched_inputs",
]

# name of a Linear -> its weight, made or fetched when the Linear runs and let go after
Weights = Mapping[str, Callable[[], torch.Tensor]]
# takes what entered a Linear, (..., in_features), and the gradient of what left it,
# (..., out_features): of the two, ∂loss/∂W is made
Sink = Callable[[torch.Tensor, torch.Tensor], None]


def ignore_entry(name: str) -> str:
    """For `ignore`: the Linears of this kind in all blocks."""
    parent, _, last = name.rpartition(".")
    if last.isdigit():  # of a Sequential
        return f"re:.*{re.escape(parent.rpartition('.')[2])}[.]{last}$"
    return f"re:.*{re.escape(last)}"


@contextmanager
def watched_inputs(
    linears: Mapping[str, Linear], note: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """
    Within the context `note` is told the name of every Linear that is called, and what
    it is called with: (..., in_features), of an expert perhaps without any token.

    :raises ValueError: if llm-compressor's pruners cannot calibrate by it
    """
    with ExitStack() as stack:
        for name, linear in linears.items():
            hook = partial(_note_input, name, note)
            watch = partial(linear.register_forward_pre_hook, hook, with_kwargs=True)
            stack.callback(watch().remove)  # in one line: an interrupt may come between
        yield


def _note_input(
    name: str,
    note: Callable[[str, torch.Tensor], None],
    module: Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    if args and isinstance(args[0], torch.Tensor) and args[0].dim() in (2, 3):
        note(name, args[0])
        return
    told = f"{args[0].dim()} dimensions" if args else f"the keyword {[*kwargs][0]}"
    raise ValueError(
        f"targets: the Linear {name} gets its input with {told}, by which "
        f"llm-compressor's pruners cannot calibrate it. Name it in `ignore`, as "
        f"{ignore_entry(name)!r}"
    )


def all_given(weights: Mapping[str, torch.Tensor]) -> Weights:
    """Of weights that are made already."""
    return {name: partial(_itself, weight) for name, weight in weights.items()}


def _itself(weight: torch.Tensor) -> torch.Tensor:
    return weight


@contextmanager
def replaced_weights(linears: Mapping[str, Linear], weights: Weights) -> Iterator[None]:
    """Within the context the Linears named in `weights` compute with these."""
    with ExitStack() as stack:
        for name, weight in weights.items():
            forward = partial(_apply, linears[name], weight)
            stack.enter_context(replaced_forward(linears[name], forward))
        yield


@contextmanager
def differentiated(
    linears: Mapping[str, Linear], weights: Weights, sinks: Mapping[str, Sink]
) -> Iterator[None]:
    """
    As `replaced_weights`; in the backward pass each Linear's sink is told its input and
    the gradient of its output, and no gradient of a weight is made or held.
    """
    with ExitStack() as stack:
        for name, weight in weights.items():
            forward = partial(_apply_differentiated, linears[name], weight, sinks[name])
            stack.enter_context(replaced_forward(linears[name], forward))
        yield


def _apply(
    linear: Linear, weight: Callable[[], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    return apply_linear(x, weight().to(x.device), linear.bias)


def _apply_differentiated(
    linear: Linear, weight: Callable[[], torch.Tensor], sink: Sink, x: torch.Tensor
) -> torch.Tensor:
    return _Differentiated.apply(x, linear.bias, weight, sink)


class _Differentiated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        weight: Callable[[], torch.Tensor],
        sink: Sink,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.sink = weight, sink
        return apply_linear(x, weight().to(x.device), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        if x.numel():
            ctx.sink(x, gradient)
        return gradient.matmul(ctx.weight().to(x.device)), None, None, None
