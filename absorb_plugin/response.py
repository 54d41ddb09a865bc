"""
In-situ response: what does relief of one block bring in the network as it is pruned?

The network runs under the masks of an allocation. Relaxing block l alone by δ starts a
trajectory behind it that runs on through the masked blocks l+1 … L. Its drop of
calibration cross-entropy is the response

    g_l = loss(allocation) − loss(allocation with s_l − δ)

so it sees what the dense network's absorption cannot: that a pruned network absorbs
less. All L trajectories share the prefix of the first: L(L+1)/2 block passes.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from compressed_tensors.offload import disable_offloading
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch
from absorb_plugin.loss import check_predicted, cross_entropy_sums
from absorb_plugin.masks import BlockMasks
from absorb_plugin.sampling import standard_error
from absorb_plugin.sweep import Passenger, RunBlock, Tail

__all__ = ["CandidateScores", "MaskedPassenger", "Response", "ResponseProbe"]


@dataclass(frozen=True)
class Response:
    """
    What the response probe measured.

    :param response: g_l in nats per token, shape (prunable blocks,)
    :param response_error: standard error of g_l over samples; NaN for one sample
    :param loss: cross-entropy under the allocation itself, nats per token
    :param tokens: number of predicted tokens
    """

    response: np.ndarray
    response_error: np.ndarray
    loss: float
    tokens: int


class MaskedPassenger(Passenger):
    """
    What the passengers that run blocks under masks share.

    :param blocks: all blocks; their prunable Linears are masked
    :param input_square_sums: full name of a Linear -> a_j, for the masks
    :param offsets: full name of a Linear -> its sparsity minus that of its block
    """

    masked = True

    def __init__(
        self,
        blocks: BlockMap,
        input_square_sums: Mapping[str, torch.Tensor],
        offsets: Mapping[str, float] | None = None,
    ) -> None:
        self._blocks, self._square_sums = blocks, input_square_sums
        self._offsets = offsets or {}
        self._rows = {block: row for row, block in enumerate(blocks.prunable)}
        self._in_force = ExitStack()

    def close(self) -> None:
        self._in_force.close()

    def _masks(self, index: int) -> BlockMasks:
        block = self._blocks.blocks[index]
        linears = {name: block.linears[name] for name in self._seen(index)}
        sums = {name: self._square_sums[block.full_name(name)] for name in linears}
        return BlockMasks(linears, sums)

    def _at(self, index: int, sparsities: np.ndarray) -> dict[str, float]:
        """Name -> sparsity of the Linears of a block under an allocation."""
        sparsity = float(sparsities[self._rows[index]])
        block = self._blocks.blocks[index]
        offsets = {
            name: self._offsets.get(block.full_name(name), 0.0)
            for name in self._seen(index)
        }
        return {n: min(1.0, max(0.0, sparsity + o)) for n, o in offsets.items()}

    def _seen(self, index: int) -> list[str]:
        """Linears that saw a token: for the others there is no score to mask by."""
        block = self._blocks.blocks[index]
        return [n for n in block.linears if block.full_name(n) in self._square_sums]


class ResponseProbe(MaskedPassenger):
    """
    Passenger of a sweep that measures the response of every prunable block.

    :param sparsities: the allocation under which the network runs, one per prunable
        block
    :param step: δ, by how much a block is relaxed
    """

    kept = ("_losses", "_tokens")

    def __init__(
        self,
        blocks: BlockMap,
        input_square_sums: Mapping[str, torch.Tensor],
        sparsities: np.ndarray,
        step: float,
        offsets: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(blocks, input_square_sums, offsets)
        self._sparsities, self._step = sparsities, step
        self.trajectories = len(self._rows)
        self._losses: list[list[float]] = []  # per sample: own run, then one per block
        self._tokens: list[int] = []

    def start(self, batch: Batch) -> None:
        self._relaxed: dict[int, torch.Tensor] = {}

    def enter(self, index: int, block: Module) -> None:
        if index in self._rows:
            self._current = self._masks(index)
            self._in_force.enter_context(
                self._current.applied(self._at(index, self._sparsities))
            )

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        for source, hidden in self._relaxed.items():
            self._relaxed[source] = run(hidden)
        if index in self._rows:
            relaxed = self._at(index, self._sparsities - self._step)
            with self._current.applied(relaxed):
                self._relaxed[index] = run(before)
            del self._current
        self._in_force.close()
        self._own = after

    def finish(self, batch: Batch, tail: Tail) -> None:
        states = [self._own, *self._relaxed.values()]
        with disable_offloading():  # the head, once for all of them
            scored = [cross_entropy_sums(tail, batch, h) for h in states]
        for sample in zip(*scored, strict=True):
            self._losses.append([total for total, _ in sample])
            self._tokens.append(sample[0][1])
        del self._own, self._relaxed

    def response(self) -> Response:
        """Means over all samples seen so far."""
        losses = np.array(distributed.gather_shares(self._losses))
        tokens = np.array(distributed.gather_shares(self._tokens), dtype=np.float64)
        total = check_predicted(int(tokens.sum()))
        gains = losses[:, :1] - losses[:, 1:]
        mean = gains.sum(axis=0) / total
        error = standard_error(gains, tokens[:, None])
        return Response(mean, error, float(losses[:, 0].sum() / total), total)


class CandidateScores(MaskedPassenger):
    """
    Passenger of a sweep that scores whole allocations: each is a trajectory of its own
    from the first block on, L block passes each. The first is the model's own pass.

    :param candidates: allocations, each one sparsity per prunable block
    """

    kept = ("_losses", "_tokens")

    def __init__(
        self,
        blocks: BlockMap,
        input_square_sums: Mapping[str, torch.Tensor],
        candidates: Sequence[np.ndarray],
        offsets: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(blocks, input_square_sums, offsets)
        self._own, *self._others = candidates
        self.trajectories = len(self._others)
        self._losses: list[list[float]] = []
        self._tokens: list[int] = []

    def start(self, batch: Batch) -> None:
        self._hidden: list[torch.Tensor] = []

    def enter(self, index: int, block: Module) -> None:
        if index in self._rows:
            self._current = self._masks(index)
            self._in_force.enter_context(
                self._current.applied(self._at(index, self._own))
            )

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self._in_force.close()
        states = self._hidden[1:] or [before] * len(self._others)
        self._hidden = [after]
        for candidate, hidden in zip(self._others, states, strict=True):
            with ExitStack() as stack:
                if index in self._rows:
                    sparsities = self._at(index, candidate)
                    stack.enter_context(self._current.applied(sparsities))
                self._hidden.append(run(hidden))
        if index in self._rows:
            del self._current

    def finish(self, batch: Batch, tail: Tail) -> None:
        with disable_offloading():
            scored = [cross_entropy_sums(tail, batch, h) for h in self._hidden]
        for sample in zip(*scored, strict=True):
            self._losses.append([total for total, _ in sample])
            self._tokens.append(sample[0][1])
        del self._hidden

    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Sums of cross-entropy in nats, shape (candidates, samples), and the number of
        predicted tokens, shape (samples,).
        """
        losses = distributed.gather_shares(self._losses)
        tokens = distributed.gather_shares(self._tokens)
        check_predicted(sum(tokens))
        return np.array(losses).T, np.array(tokens)
