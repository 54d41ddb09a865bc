"""
In-situ response: what does relief of one group bring in the network as it is pruned?

The network runs under the masks of an allocation. Relaxing one group of a block by δ
starts a trajectory after it that runs on through the masked blocks that follow. Its
drop of calibration cross-entropy is the response

    g = loss(allocation) − loss(allocation with s − δ in the group)

so it sees what the dense network's absorption cannot: that a pruned network absorbs
less. All trajectories share the prefix of the first; with one group per block there are
L(L+1)/2 block passes.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.loss import check_predicted, score_states
from absorb_plugin.forward.probe import Needs, Probe, RunBlock
from absorb_plugin.groups import Groups
from absorb_plugin.pruners.masks import MaskedWeights, block_sparsities
from absorb_plugin.search.descent import Slopes
from absorb_plugin.search.standard_error import standard_error
from absorb_plugin.signals.base import Context, Signal

__all__ = ["Response", "ResponseProbe", "ResponseSignal"]


@dataclass(frozen=True)
class Response:
    """
    What the response probe measured.

    :param response: g in nats per token, shape (groups,)
    :param response_error: standard error of g over samples; NaN for one sample
    :param loss: cross-entropy under the allocation itself, nats per token
    :param tokens: number of predicted tokens
    """

    response: np.ndarray
    response_error: np.ndarray
    loss: float
    tokens: int


class ResponseProbe(Probe):
    """
    Measures the response of every group.

    :param blocks: all blocks; their prunable Linears are masked
    :param groups: what is relaxed; each lies within one block
    :param masks: makes the weights
    :param allocation: one sparsity per prunable Linear, under which the network runs
    :param step: δ, by how much a group is relaxed
    """

    state = ("_losses", "_tokens")
    runs_pruned = True

    def __init__(
        self,
        blocks: BlockMap,
        groups: Groups,
        masks: MaskedWeights,
        allocation: np.ndarray,
        step: float,
    ) -> None:
        self._masks = masks
        self.in_step = masks.joined
        self._sparsities = block_sparsities(blocks, allocation)
        relaxed = block_sparsities(blocks, relieved(groups, allocation, step))
        self._relief = _reliefs(blocks, groups, self._sparsities, relaxed)
        self._groups = len(groups)
        self._in_force = ExitStack()
        self._losses: list[list[float]] = []  # per sample: own run, then one per group
        self._tokens: list[int] = []

    @property
    def needs(self) -> Needs:
        joined = 1 if self._masks.joined else 0
        return Needs(trajectories=self._groups, pruned=2, joined=joined)

    def start(self, batch: Batch) -> None:
        self._relaxed: dict[int, torch.Tensor] = {}

    def enter(self, index: int, block: Module) -> None:
        if index in self._sparsities:
            own = self._masks.applied(index, self._sparsities[index])
            self._in_force.enter_context(own)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        for group, hidden in self._relaxed.items():
            self._relaxed[group] = run(hidden)
        for group, sparsities in self._relief.get(index, {}).items():
            with self._masks.applied(index, sparsities):
                self._relaxed[group] = run(before)
        self._in_force.close()
        self._own = after

    def finish(self, batch: Batch, head: OutputHead) -> None:
        states = [self._own, *(self._relaxed[i] for i in range(self._groups))]
        losses, tokens = score_states(head, batch, states)
        self._losses += losses
        self._tokens += tokens
        del self._own, self._relaxed

    def close(self) -> None:
        self._in_force.close()

    def result(self) -> Response:
        """Means over all samples seen so far."""
        losses = np.array(distributed.gather_shares(self._losses))
        tokens = np.array(distributed.gather_shares(self._tokens), dtype=np.float64)
        total = check_predicted(int(tokens.sum()))
        gains = losses[:, :1] - losses[:, 1:]
        mean = gains.sum(axis=0) / total
        error = standard_error(gains, tokens[:, None])
        return Response(mean, error, float(losses[:, 0].sum() / total), total)


def relieved(groups: Groups, allocation: np.ndarray, step: float) -> np.ndarray:
    """
    Every group relaxed by δ; one that has less than half of it to give, pruned by δ
    more instead.

    :param allocation: one sparsity per prunable Linear, (N,), as is what returns
    :param step: δ
    """
    less = np.maximum(0.0, allocation - step)
    scarce = groups.mean(allocation - less) < step / 2
    return np.where(groups.spread(scarce), np.minimum(1.0, allocation + step), less)


def _reliefs(
    blocks: BlockMap,
    groups: Groups,
    own: Mapping[int, Mapping[str, float]],
    relaxed: Mapping[int, Mapping[str, float]],
) -> dict[int, dict[int, dict[str, float]]]:
    """Block -> group -> the block's sparsities with that group relaxed."""
    group_of = dict(zip(groups.linears, groups.of.tolist(), strict=True))
    found: dict[int, dict[int, dict[str, float]]] = {}
    for index, sparsities in own.items():
        home = {n: group_of[blocks.blocks[index].full_name(n)] for n in sparsities}
        found[index] = {
            group: {
                name: relaxed[index][name] if home[name] == group else sparsity
                for name, sparsity in sparsities.items()
            }
            for group in dict.fromkeys(home.values())
        }
    return found


class ResponseSignal(Signal):
    """
    The response of every group.

    :param step: δ, by how much a group is relaxed
    """

    name: ClassVar[str] = "response"

    step: float = Field(default=0.1, gt=0, lt=1)

    def measurer(self, context: Context) -> Callable[[np.ndarray], Slopes]:
        return partial(self._slopes, context)

    def _slopes(self, context: Context, allocation: np.ndarray) -> Slopes:
        probe = ResponseProbe(
            context.blocks, context.groups, context.masks, allocation, self.step
        )
        samples = context.samples.next_signal()
        found = context.runner.run("Response probe", samples, probe)
        groups, sizes = context.groups, context.groups.sizes
        relief = allocation - relieved(groups, allocation, self.step)
        change = groups.total(sizes * relief) / sizes.sum()
        error = found.response_error / np.abs(change)
        return Slopes(found.response / change, error, found.loss)
