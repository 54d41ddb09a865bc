"""
A judge of whole allocations: the held-out loss after the pruner's own arithmetic.

Masks alone judge an allocation well where the pruner is Wanda, which sets masks and
nothing else. SparseGPT makes the weights that remain answer for the pruned ones, in
some blocks far better than in others, and what its masks promise may then be wrong. So
an allocation is tried out before it is handed over: block after block, on calibration
samples, as the pruner goes about it.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack

import numpy as np
import torch
from torch.nn import Linear, Module

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.linears import all_given, replaced_weights
from absorb_plugin.forward.loss import gathered_losses, score_states
from absorb_plugin.forward.probe import Needs, Probe, RunBlock
from absorb_plugin.pruners.base import Pruner
from absorb_plugin.pruners.masks import block_sparsities
from absorb_plugin.pruners.observed import Observed, observed_inputs, prune_observed
from absorb_plugin.pruners.quantization import QuantizedLinears
from absorb_plugin.pruners.together import Work, shared_out, told

__all__ = ["PrunedLoss", "judged_rows"]


class PrunedLoss(Probe):
    """
    Prunes the model by every candidate, on one batch.

    Each candidate is a trajectory from the first block on. It passes a block twice:
    with the block's own weights, for the inputs of its Linears, in which what is judged
    by has no part, and with the pruned ones. The first takes the model's own pass.
    Under torch.distributed each rank has its share of the samples and of the Linears
    that are to be pruned.

    :param blocks: all blocks; their prunable Linears are pruned
    :param pruner: how weights are pruned
    :param candidates: allocations, each one sparsity per prunable Linear
    :param calibrating: so many first samples of the batch are what weights are pruned
        by; the others are what is judged by
    :param together: prune a block for all candidates at once: fewer and larger steps,
        and the memory of them all
    :param quantized: what pruned Linears are quantised to afterwards; in that what
        weights are pruned by has no part, and what is judged by has
    """

    state = ("_losses", "_tokens")
    own_weights = True
    in_step = True

    def __init__(
        self,
        blocks: BlockMap,
        pruner: Pruner,
        candidates: Sequence[np.ndarray],
        calibrating: int,
        together: bool = False,
        quantized: QuantizedLinears | None = None,
    ) -> None:
        self._blocks, self._pruner, self._calibrating = blocks, pruner, calibrating
        self._quantized = quantized
        self.apart = calibrating
        self._candidates = [block_sparsities(blocks, one) for one in candidates]
        self.may_overflow = bool(np.any(candidates[0]))
        self._at_once = len(self._candidates) if together else 1
        self._in_force = ExitStack()
        self._losses: list[list[float]] = []
        self._tokens: list[int] = []

    def share(self, samples: Sequence[dict]) -> list[dict]:
        pruning = distributed.share(samples[: self._calibrating])
        judged = distributed.share(samples[self._calibrating :])
        self._calibrating = self.apart = len(pruning)
        return [*pruning, *judged]

    @property
    def needs(self) -> Needs:
        # of several ranks one may observe while it waits to prune
        observed = 1 if distributed.ranks() == 1 else 2
        return Needs(
            trajectories=len(self._candidates),
            pruned=len(self._candidates) + (self._quantized is not None),
            hessians=self._pruner.hessians,
            sets=max(self._at_once, observed),
            single_batch=True,
        )

    def start(self, batch: Batch) -> None:
        self._mask = token_mask(batch).clone()
        self._mask[self._calibrating :] = False
        self._hidden: list[torch.Tensor] = []

    def enter(self, index: int, block: Module) -> None:
        watched = self._watched(index, self._mask)
        self._own = self._in_force.enter_context(watched)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> torch.Tensor | None:
        self._in_force.close()
        states = [before, *self._hidden[1:]]
        states += [before] * (len(self._candidates) - len(states))
        self._hidden = []
        linears = self._blocks.blocks[index].linears
        # of several candidates there is work for several ranks
        size = max(self._at_once, distributed.ranks())
        for start in range(0, len(states), size):
            some = range(start, min(start + size, len(states)))
            loads = [0.0] * distributed.ranks()
            work = [
                shared_out(
                    linears,
                    self._observed(index, one, states[one], run),
                    self._pruner,
                    sets=len(some),
                    loads=loads,
                )
                for one in some
            ]
            owners = [one.owners for one in work]
            made = self._pruned(linears, index, some, work)
            for one in some:
                pruned = told(linears, made.pop(0), owners.pop(0))
                after = self._run_pruned(index, pruned, states[one], run)
                del pruned  # or two would be held
                self._hidden.append(after)
        return self._hidden[0]

    def finish(self, batch: Batch, head: OutputHead) -> None:
        judged = judged_rows(batch, self._calibrating)
        if self.idle or not len(judged["input_ids"]):  # there are more ranks
            return
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
        return gathered_losses(self._losses, self._tokens)

    def _watched(
        self, index: int, mask: torch.Tensor
    ) -> AbstractContextManager[Observed]:
        linears = self._blocks.blocks[index].linears
        return observed_inputs(self._pruner.observe, linears, mask)

    def _observed(
        self, index: int, candidate: int, state: torch.Tensor, run: RunBlock
    ) -> Observed:
        """Of the inputs of a block's Linears, in which what is judged has no part."""
        if candidate == 0:  # the model's own pass
            found = self._own
            del self._own  # held by no one else, or it would outlive its use
            return found
        if not self._calibrating:  # there are more ranks than samples
            return Observed()
        calibrating = slice(self._calibrating)
        with self._watched(index, self._mask[calibrating]) as observed:
            run.of_samples(calibrating)(state[calibrating])
        return observed

    def _pruned(
        self,
        linears: Mapping[str, Linear],
        index: int,
        candidates: Sequence[int],
        work: Sequence[Work],
    ) -> list[dict[str, list[torch.Tensor]]]:
        """
        What this rank makes of a block for each of some candidates.

        :param work: of each; what was observed is let go once it has served
        """
        made: list[dict[str, list[torch.Tensor]]] = []
        wanted = [self._wanted(index, one) for one in candidates]
        for start in range(0, len(work), self._at_once):
            some = slice(start, start + self._at_once)
            observed = [one.observed for one in work[some]]
            made += prune_observed(self._pruner, linears, observed, wanted[some])
            for one in observed:
                one.groups.clear()
        return made

    def _run_pruned(
        self,
        index: int,
        pruned: Mapping[str, Sequence[torch.Tensor]],
        state: torch.Tensor,
        run: RunBlock,
    ) -> torch.Tensor:
        # a function: its weights must be gone when the next are made
        weights = {name: weight for name, (weight,) in pruned.items()}
        block = self._blocks.blocks[index]
        as_pruned = replaced_weights(block.linears, all_given(weights))
        if self._quantized is None:
            with as_pruned:
                return run(state)
        calibrating, judged = slice(self._calibrating), slice(self._calibrating, None)
        states = []
        with as_pruned, self._quantized.noting_ranges(index, block.module) as ranges:
            if self._calibrating:
                states.append(run.of_samples(calibrating)(state[calibrating]))
        if len(state[judged]):
            with self._quantized.applied(index, block.module, weights, ranges):
                states.append(run.of_samples(judged)(state[judged]))
        return torch.cat(states)

    def _wanted(self, index: int, candidate: int) -> dict[str, list[float]]:
        sparsities = self._candidates[candidate].get(index, {})
        return {name: [s] for name, s in sparsities.items()}


def judged_rows(batch: Batch, calibrating: int) -> dict[str, torch.Tensor]:
    """Of a batch the samples that weights are not pruned by."""
    names = ("input_ids", "attention_mask")
    return {name: batch[name][calibrating:] for name in names if name in batch}
