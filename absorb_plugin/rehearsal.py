"""
A rehearsal of SparseGPT: whole allocations judged by the pruner that is to follow.

Masks alone judge an allocation well where the pruner is Wanda, which sets masks and
nothing else. SparseGPT makes the weights that remain answer for the pruned ones, in
some blocks far better than in others, and what its masks promise may then be wrong. So
what the search found is tried out before it is handed over: block after block, on a few
calibration samples, as SparseGPT goes about it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from compressed_tensors.offload import disable_offloading
from torch.nn import Module

from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.compensation import Compensation
from absorb_plugin.loss import check_predicted, cross_entropy_sums
from absorb_plugin.masks import replaced_weights
from absorb_plugin.response import MaskedPassenger
from absorb_plugin.sweep import RunBlock, Tail

__all__ = ["Rehearsal"]

# what enters a block's Linears: calibration inputs (tokens, in_features), and the names
# of the Linears that share them
Inputs = list[tuple[torch.Tensor, list[str]]]


class Rehearsal(MaskedPassenger):
    """
    Passenger of a sweep, of one batch, that prunes the model by every candidate.

    Each candidate is a trajectory from the first block on. It passes a block twice:
    with the block's own weights, for the inputs of its Linears, and with the pruned
    ones. The first candidate rides the model's own pass.

    :param candidates: allocations, each one sparsity per prunable block
    :param compensation: how weights are pruned
    :param calibrating: so many first samples of the batch are what weights are pruned
        by; the others are what is judged by
    """

    kept = ("_losses", "_tokens")
    compensates = True
    undivided = True

    def __init__(
        self,
        blocks: BlockMap,
        input_square_sums: Mapping[str, torch.Tensor],
        candidates: Sequence[np.ndarray],
        compensation: Compensation,
        calibrating: int,
        offsets: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(blocks, input_square_sums, offsets)
        self._candidates, self._compensation = list(candidates), compensation
        self._calibrating = calibrating
        self.trajectories = len(candidates)
        self._losses: list[list[float]] = []
        self._tokens: list[int] = []

    def start(self, batch: Batch) -> None:
        self._mask = token_mask(batch).clone()
        self._mask[self._calibrating :] = False
        self._hidden: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None  # what entered the last Linear

    def enter(self, index: int, block: Module) -> None:
        self._own = self._in_force.enter_context(self._inputs(index))

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> torch.Tensor:
        self._in_force.close()
        states = [before, *self._hidden[1:]]
        states += [before] * (len(self._candidates) - len(states))
        self._hidden = []
        for number, candidate in enumerate(self._candidates):
            inputs = self._own
            if number > 0:
                with self._inputs(index) as inputs:
                    run(states[number])
            weights = self._pruned(index, candidate, inputs)
            with replaced_weights(self._blocks.blocks[index].linears, weights):
                self._hidden.append(run(states[number]))
        del self._own
        return self._hidden[0]

    def finish(self, batch: Batch, tail: Tail) -> None:
        judged = {
            name: batch[name][self._calibrating :]
            for name in ("input_ids", "attention_mask")
            if name in batch
        }
        with disable_offloading():  # the head, once for all of them
            scored = [
                cross_entropy_sums(tail, judged, hidden[self._calibrating :])
                for hidden in self._hidden
            ]
        self._losses = [[total for total, _ in losses] for losses in scored]
        self._tokens = [count for _, count in scored[0]]
        del self._hidden

    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """As of `CandidateScores`; every rank runs all samples."""
        check_predicted(sum(self._tokens))
        return np.array(self._losses), np.array(self._tokens)

    @contextmanager
    def _inputs(self, index: int) -> Iterator[Inputs]:
        """Collects what enters the Linears of a block while the context lasts."""
        found: Inputs = []
        linears = self._blocks.blocks[index].linears
        with ExitStack() as stack:
            for name in self._seen(index) if index in self._rows else ():
                note = partial(self._note, found, name)
                # in one line: between two lines an interrupt may come
                stack.callback(linears[name].register_forward_pre_hook(note).remove)
            yield found
            self._last = None

    def _note(
        self,
        found: Inputs,
        name: str,
        module: Module,
        args: tuple[torch.Tensor, ...],
    ) -> None:
        x = args[0]
        if not x.numel():  # an expert that no token was routed to
            return
        if self._last is x:
            found[-1][1].append(name)
        else:
            self._last = x
            found.append((self._of_calibration(x), [name]))

    def _of_calibration(self, x: torch.Tensor) -> torch.Tensor:
        rows, mask = x.detach().flatten(0, -2), self._mask.flatten().to(x.device)
        # Experts get some of the tokens, and nothing tells which.
        return rows[mask] if len(rows) == len(mask) else rows

    def _pruned(
        self,
        index: int,
        candidate: np.ndarray,
        inputs: Inputs,
    ) -> dict[str, torch.Tensor]:
        """Name -> pruned weight of the block's Linears."""
        if index not in self._rows:
            return {}
        sparsities = self._at(index, candidate)
        linears = self._blocks.blocks[index].linears
        weights: dict[str, torch.Tensor] = {}
        for x, names in inputs:
            pruned = self._compensation.pruned(
                [linears[name].weight for name in names],
                [sparsities[name] for name in names],
                x,
            )
            weights |= dict(zip(names, pruned, strict=True))
        return weights
