"""Statistics of the Linears' inputs, gathered while the model runs."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from compressed_tensors.offload import get_execution_device
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.forward.linears import watched_inputs
from absorb_plugin.forward.parts import current_part
from absorb_plugin.forward.probe import Needs, Probe, RunBlock

__all__ = ["InputStatistics", "real_tokens", "square_sum", "unseen_linears"]


# Tokens squared at a time: what stays in a CPU's cache.
ROWS = 1024


class InputStatistics(Probe):
    """
    Adds up Σ x_j² over the tokens that enter each Linear.

    Its hooks are registered at a block's entry and removed before any other trajectory
    runs through it, so only the model's own pass is counted.

    :param blocks: whose prunable Linears to watch
    """

    state = ("_sums", "_samples")
    own_weights = True

    def __init__(self, blocks: BlockMap) -> None:
        self._blocks = blocks
        self._sums: dict[str, torch.Tensor] = {}
        self._samples = 0
        self._in_force = ExitStack()
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def needs(self) -> Needs:
        return Needs(sums=True)

    def start(self, batch: Batch) -> None:
        self._mask = token_mask(batch)
        self._samples += len(self._mask)

    def enter(self, index: int, block: Module) -> None:
        watched = self._blocks.blocks[index]
        linears = {watched.full_name(k): x for k, x in watched.linears.items()}
        self._in_force.enter_context(watched_inputs(linears, self._note))

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self.close()

    def close(self) -> None:
        self._in_force.close()
        self._seen = None

    def result(self) -> dict[str, torch.Tensor]:
        """Full name of a Linear -> a_j, mean over samples of Σ_tokens x_j²."""
        samples = sum(distributed.gather(self._samples))
        sums = distributed.add(self._sums)
        means = {name: total / samples for name, total in sums.items()}
        for name, linear in self._blocks.linears().items():
            if name in means and name not in self._sums:  # other ranks saw tokens
                means[name] = means[name].to(get_execution_device(linear))
        return means

    def _note(self, name: str, x: torch.Tensor) -> None:
        if not x.numel():  # an expert that no token was routed to
            return
        if self._seen is None or self._seen[0] is not x:
            # queries, keys and values are made of one input
            mask = self._mask[current_part()]
            self._seen = (x, square_sum(*real_tokens(x, mask)))
        total = self._seen[1]
        if name in self._sums:
            total = total + self._sums[name]
        self._sums[name] = total


def real_tokens(
    x: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    :param x: what enters a Linear, (..., in_features)
    :param mask: True where a token of the batch counts, (batch, tokens)
    :return: x as (tokens, in_features), and which of these count. Experts of a mixture
        get some of the tokens and nothing tells which, so all of theirs count
    """
    rows, counted = x.flatten(0, -2), mask.flatten().to(x.device)
    if len(rows) != len(counted):
        counted = counted.new_ones(len(rows))
    return rows, counted


def square_sum(
    inputs: torch.Tensor, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Σ x² over tokens, float32 of shape (in_features,).

    :param inputs: (tokens, in_features)
    :param counted: which of the tokens count, bool of shape (tokens,); None for all
    """
    if counted is None:
        counted = inputs.new_ones(len(inputs), dtype=torch.bool)
    total = torch.zeros(inputs.shape[-1], dtype=torch.float32, device=inputs.device)
    for part, kept in zip(inputs.split(ROWS), counted.split(ROWS), strict=True):
        total += kept.float() @ part.float().square()
    return total


def unseen_linears(
    blocks: BlockMap, input_square_sums: Mapping[str, torch.Tensor]
) -> list[str]:
    """
    Full names of the prunable Linears that saw no token: experts never routed to.

    :param input_square_sums: from `InputStatistics`
    """
    return [name for name in blocks.linears() if name not in input_square_sums]
