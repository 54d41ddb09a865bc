"""One number per Linear from its weight and the second moments of its inputs."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch.nn import Linear, Module

from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.forward.inputs import ROWS, real_tokens
from absorb_plugin.forward.probe import Needs, Probe, RunBlock

__all__ = ["GramProbe", "gram_matrix"]


class Measuring(Protocol):
    """What `GramProbe` wants of an allocator."""

    def measure(self, weight: torch.Tensor, gram: torch.Tensor) -> float: ...

    def identity(self) -> list[object]: ...


class GramProbe(Probe):
    """
    Measures every Linear as soon as all samples have entered it, so that of the
    matrices Σ x xᵀ, which for a whole model would be larger than its weights, one is
    held at a time.

    :param blocks: whose prunable Linears to measure
    :param allocator: its `measure` gets weight and matrix
    """

    state = ("_numbers",)

    def __init__(self, blocks: BlockMap, allocator: Measuring) -> None:
        self._blocks, self._allocator = blocks, allocator
        self._numbers: dict[str, float] = {}
        self._remove: list[Callable[[], None]] = []
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def needs(self) -> Needs:
        # copies of one Linear's weight, as where it is pruned
        return Needs(pruned=True, hessians=True, single_batch=True)

    def start(self, batch: Batch) -> None:
        self._mask = token_mask(batch)

    def enter(self, index: int, block: Module) -> None:
        watched = self._blocks.blocks[index]
        for name, linear in watched.linears.items():
            note = partial(self._note, watched.full_name(name), linear)
            # in one line: between two lines an interrupt may come
            self._remove.append(linear.register_forward_pre_hook(note).remove)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self.close()

    def close(self) -> None:
        for remove in self._remove:
            remove()
        self._remove.clear()
        self._last = None

    def result(self) -> dict[str, float]:
        """Full name of a Linear -> its number, of those that saw a token."""
        return dict(self._numbers)

    def _note(
        self, name: str, linear: Linear, module: Module, args: tuple[torch.Tensor, ...]
    ) -> None:
        x = args[0]
        if not x.numel():  # an expert that no token was routed to
            return
        if self._last is None or self._last[0] is not x:
            # queries, keys and values are made of one input
            self._last = None
            self._last = (x, gram_matrix(x, self._mask))
        weight = linear.weight.detach()
        self._numbers[name] = self._allocator.measure(weight, self._last[1])


def gram_matrix(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Mean over samples of Σ_tokens x xᵀ, float32 of shape (in_features, in_features).

    :param x: what enters a Linear, (..., in_features)
    :param mask: True where a token counts, (samples, tokens)
    """
    rows, counted = real_tokens(x.detach(), mask)
    width = rows.shape[-1]
    total = torch.zeros((width, width), dtype=torch.float32, device=x.device)
    for part, kept in zip(rows.split(ROWS), counted.split(ROWS), strict=True):
        inputs = part[kept].float()
        total.addmm_(inputs.T, inputs)
    return total.div_(len(mask))
