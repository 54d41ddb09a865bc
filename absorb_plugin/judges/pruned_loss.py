"""
A judge of whole allocations: the held-out loss after the pruner's own arithmetic.

Masks alone judge an allocation well where the pruner is Wanda, which sets masks and
nothing else. SparseGPT makes the weights that remain answer for the pruned ones, in
some blocks far better than in others, and what its masks promise may then be wrong. So
an allocation is tried out before it is handed over: block after block, on calibration
samples, as the pruner goes about it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch.nn import Linear, Module

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.linears import given, replaced_weights
from absorb_plugin.forward.loss import check_predicted, score_states
from absorb_plugin.forward.probe import Needs, Probe, RunBlock
from absorb_plugin.pruners.base import Pruner
from absorb_plugin.pruners.weights import (
    Observed,
    ObservedInputs,
    block_sparsities,
    prune_observed,
)

__all__ = ["PrunedLoss", "judged_rows"]


class PrunedLoss(Probe):
    """
    Prunes the model by every candidate, on one batch.

    Each candidate is a trajectory from the first block on. It passes a block twice:
    with the block's own weights, for the inputs of its Linears, in which what is judged
    by has no part, and with the pruned ones. The first takes the model's own pass.
    Under torch.distributed each rank has its share of the candidates, and all samples.

    :param blocks: all blocks; their prunable Linears are pruned
    :param pruner: how weights are pruned
    :param candidates: allocations, each one sparsity per prunable Linear
    :param calibrating: so many first samples of the batch are what weights are pruned
        by; the others are what is judged by
    :param together: prune a block for all candidates at once: fewer and larger steps,
        and the memory of them all
    """

    state = ("_losses", "_tokens")

    def __init__(
        self,
        blocks: BlockMap,
        pruner: Pruner,
        candidates: Sequence[np.ndarray],
        calibrating: int,
        together: bool = False,
    ) -> None:
        self._blocks, self._pruner, self._calibrating = blocks, pruner, calibrating
        self.apart = calibrating
        mine = distributed.share(candidates)
        self._candidates = [block_sparsities(blocks, one) for one in mine]
        self.may_overflow = any(np.any(one) for one in mine[:1])
        self._at_once = max(1, len(self._candidates)) if together else 1
        self._in_force = ExitStack()
        self._losses: list[list[float]] = []
        self._tokens: list[int] = []

    @property
    def needs(self) -> Needs:
        return Needs(
            trajectories=len(self._candidates),
            pruned=len(self._candidates),
            hessians=self._pruner.hessians,
            sets=self._at_once,
            single_batch=True,
        )

    def start(self, batch: Batch) -> None:
        self._mask = token_mask(batch).clone()
        self._mask[self._calibrating :] = False
        self._hidden: list[torch.Tensor] = []

    def enter(self, index: int, block: Module) -> None:
        watch = self._inputs(index, self._mask)
        self._own = self._in_force.enter_context(watch.watched())

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> torch.Tensor | None:
        self._in_force.close()
        if not self._candidates:  # there are more ranks
            return None
        states = [before, *self._hidden[1:]]
        states += [before] * (len(self._candidates) - len(states))
        self._hidden = []
        linears = self._blocks.blocks[index].linears
        for start in range(0, len(states), self._at_once):
            some = range(start, min(start + self._at_once, len(states)))
            observed = [self._observed(index, one, states[one], run) for one in some]
            wanted = [self._wanted(index, one) for one in some]
            made = prune_observed(self._pruner, linears, observed, wanted)
            del observed  # or two sets of Hessians would be held
            for one in some:
                after = self._run_pruned(linears, made.pop(0), states[one], run)
                self._hidden.append(after)
        return self._hidden[0]

    def finish(self, batch: Batch, head: OutputHead) -> None:
        if not self._candidates:
            return
        judged = judged_rows(batch, self._calibrating)
        states = [hidden[self._calibrating :] for hidden in self._hidden]
        self._losses, self._tokens = score_states(head, judged, states)
        del self._hidden

    def release(self) -> bool:
        """From here on one candidate at a time."""
        more, self._at_once = self._at_once > 1, 1
        return more

    def close(self) -> None:
        self._in_force.close()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """As of `MaskedLoss`."""
        losses = distributed.gather_shares(list(zip(*self._losses)))
        tokens = distributed.from_first(self._tokens)
        check_predicted(sum(tokens))
        return np.array(losses), np.array(tokens)

    def _inputs(self, index: int, mask: torch.Tensor) -> ObservedInputs:
        linears = self._blocks.blocks[index].linears
        return ObservedInputs(self._pruner, linears, mask)

    def _observed(
        self, index: int, candidate: int, state: torch.Tensor, run: RunBlock
    ) -> Observed:
        """Of the inputs of a block's Linears, in which what is judged has no part."""
        if candidate == 0:  # the model's own pass
            found = self._own
            del self._own  # held by no one else, or it would outlive its use
            return found
        calibrating = slice(self._calibrating)
        watch = self._inputs(index, self._mask[calibrating])
        with watch.watched() as observed:
            run.of_samples(calibrating)(state[calibrating])
        return observed

    @staticmethod
    def _run_pruned(
        linears: Mapping[str, Linear],
        pruned: Mapping[str, Sequence[torch.Tensor]],
        state: torch.Tensor,
        run: RunBlock,
    ) -> torch.Tensor:
        # a function: its weights must be gone when the next are made
        weights = {name: partial(given, weight) for name, (weight,) in pruned.items()}
        with replaced_weights(linears, weights):
            return run(state)

    def _wanted(self, index: int, candidate: int) -> dict[str, list[float]]:
        sparsities = self._candidates[candidate].get(index, {})
        return {name: [s] for name, s in sparsities.items()}


def judged_rows(batch: Batch, calibrating: int) -> dict[str, torch.Tensor]:
    """Of a batch the samples that weights are not pruned by."""
    names = ("input_ids", "attention_mask")
    return {name: batch[name][calibrating:] for name in names if name in batch}
