"""A judge of whole allocations: the held-out loss under the masks of each."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch.nn import Module

from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.loss import gathered_losses, score_states
from absorb_plugin.forward.probe import Needs, Probe, RunBlock
from absorb_plugin.pruners.masks import MaskedWeights, block_sparsities

__all__ = ["MaskedLoss"]


class MaskedLoss(Probe):
    """
    Each candidate is a trajectory of its own from the first block on, L block passes.
    The first is the model's own pass.

    :param blocks: all blocks; their prunable Linears are masked
    :param masks: makes the weights
    :param candidates: allocations, each one sparsity per prunable Linear
    """

    state = ("_losses", "_tokens")

    def __init__(
        self,
        blocks: BlockMap,
        masks: MaskedWeights,
        candidates: Sequence[np.ndarray],
    ) -> None:
        self._masks = masks
        self.in_step = masks.joined
        self._candidates = [block_sparsities(blocks, one) for one in candidates]
        self.may_overflow = bool(np.any(candidates[0]))
        self._in_force = ExitStack()
        self._losses: list[list[float]] = []
        self._tokens: list[int] = []

    @property
    def needs(self) -> Needs:
        candidates = len(self._candidates)
        joined = 1 if self._masks.joined else 0
        return Needs(trajectories=candidates - 1, pruned=candidates, joined=joined)

    def start(self, batch: Batch) -> None:
        self._hidden: list[torch.Tensor] = []

    def enter(self, index: int, block: Module) -> None:
        if not self._losses:  # of the first batch
            for name in self._masks.seen(index):
                wanted = [one[index][name] for one in self._candidates]
                self._masks.rank(index, name, wanted)
        self._apply(self._in_force, index, 0)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self._in_force.close()
        states = self._hidden[1:] or [before] * (len(self._candidates) - 1)
        self._hidden = [after]
        for number, hidden in enumerate(states, start=1):
            with ExitStack() as stack:
                self._apply(stack, index, number)
                self._hidden.append(run(hidden))

    def finish(self, batch: Batch, head: OutputHead) -> None:
        losses, tokens = score_states(head, batch, self._hidden)
        self._losses += losses
        self._tokens += tokens
        del self._hidden

    def close(self) -> None:
        self._in_force.close()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Sums of cross-entropy in nats, shape (candidates, samples), and the number of
        predicted tokens, shape (samples,).
        """
        return gathered_losses(self._losses, self._tokens)

    def _apply(self, stack: ExitStack, index: int, candidate: int) -> None:
        sparsities = self._candidates[candidate].get(index)
        if sparsities is not None:
            stack.enter_context(self._masks.applied(index, sparsities))
