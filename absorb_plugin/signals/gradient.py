"""
The slope of the loss in every Linear's sparsity, from one backward pass.

The network runs under the weights W̃(s) that a pruner makes of an allocation, and the
cross-entropy is differentiated once:

    slope = ⟨∂loss/∂W̃, (W̃(s+δ) − W̃(s−δ)) / 2δ⟩

For a pruner that masks this is −Σ_band g_ij·w_ij / 2δ over the weights whose rank lies
within ±δ of the threshold: restoring a masked weight changes the loss by about
+g_ij·w_ij, masking a kept one by about −g_ij·w_ij, and the second-order terms of the
two have opposite signs. For SparseGPT it contains how the weights that remain make up
for the others. It costs four block passes per block (forward, recomputation, backward
and that of the change), one less where there is room to keep the forward's graph.

∂loss/∂W̃ is never made: with x what enters the Linear and y' the gradient of what leaves
it, the slope is Σ over tokens of y'·(dW̃/ds x), which is known for each sample, and so
is its standard error.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from compressed_tensors.offload import disable_offloading
from pydantic import Field
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin._llmcompressor import get_calibrate_all_experts_flag
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch
from absorb_plugin.forward.graphs import KeptGraphs
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.linears import differentiated, replaced_weights
from absorb_plugin.forward.loss import check_predicted, loss_gradient
from absorb_plugin.forward.probe import Needs, Probe, RunBlock
from absorb_plugin.groups import EXPERT, Groups, linear_names
from absorb_plugin.precision import widest_float
from absorb_plugin.pruners.slopes import Change, MaskedSlopes, SlopeSource
from absorb_plugin.search.descent import Slopes, Stage
from absorb_plugin.search.standard_error import standard_error
from absorb_plugin.signals.base import Context, Signal

__all__ = ["Gradient", "GradientProbe", "LinearSlopes", "measured_slopes"]

# Of the way of a descent, what is taken: the rest of it does a little good on text like
# that of the calibration, and harm on other text (docs/experiments.md).
SHARE = 0.8
# Different tokens needed for that. With fewer a smaller part is taken, by the root of
# their number, for more of what they say is chance.
ENOUGH = 2048


class GradientProbe(Probe):
    """
    Measures the slope of every prunable Linear.

    :param blocks: all blocks
    :param source: the weights under which the network runs, and how they change

    Attributes:
        keeps_graphs: of blocks while there is room; not any more after memory ran out
    """

    state = ("_slopes", "_tokens", "_losses", "_mixed")
    runs_pruned = True
    # of the class until a batch runs, for they are no part of what is measured
    keeps_graphs = True
    _graphs = KeptGraphs(0)

    def __init__(self, blocks: BlockMap, source: SlopeSource) -> None:
        self._blocks, self._source = blocks, source
        self.in_step = source.joined
        self._rows = {name: row for row, name in enumerate(linear_names(blocks))}
        self._in_force = ExitStack()
        # one entry per sample
        self._slopes: list[np.ndarray] = []  # ∂(sum of losses)/∂s, (Linears,)
        self._tokens: list[int] = []
        self._losses: list[float] = []
        # Linears whose tokens are of no known sample: experts
        self._mixed: set[int] = set()

    @property
    def needs(self) -> Needs:
        # inputs of all blocks, and two gradients
        return Needs(
            trajectories=len(self._blocks) + 2,
            pruned=3,
            backward=True,
            kept_weights=self._source.kept_weights,
            joined=2 if self._source.joined else 0,
        )

    def start(self, batch: Batch) -> None:
        self._shape = batch["input_ids"].shape
        # by Linear, on the device: to fetch each at once would have it wait
        self._current: list[tuple[int, torch.Tensor]] = []
        self._visits: list[tuple[torch.Tensor, torch.Tensor | None, RunBlock]] = []
        # blocks that the ranks put together would not stay apart
        keeps = self.keeps_graphs and not self._source.joined
        self._graphs = KeptGraphs(self.left if keeps else 0)

    def enter(self, index: int, block: Module) -> None:
        if not self._slopes:  # of the first batch
            self._source.rank(index)
        if self._graphs.may_keep(block):
            self._in_force.enter_context(self._differentiated(index))
            self._in_force.enter_context(self._graphs.recording())
            return
        linears = self._blocks.blocks[index].linears
        weights = self._source.weights(index)
        self._in_force.enter_context(replaced_weights(linears, weights))

    def redirect(self, index: int, before: torch.Tensor) -> torch.Tensor | None:
        # where a graph is recorded, from here on
        return before.detach().requires_grad_() if torch.is_grad_enabled() else None

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> torch.Tensor:
        recorded = torch.is_grad_enabled()
        self._in_force.close()
        kept = after if recorded and self._graphs.keep() else None
        self._visits.append((before, kept, run))
        self._last = after.detach()
        return self._last

    def finish(self, batch: Batch, head: OutputHead) -> None:
        losses, gradient = loss_gradient(head, batch, self._last)
        for index in reversed(range(len(self._visits))):
            with disable_offloading():
                gradient = self._backward(index, *self._visits.pop(), gradient)
        slopes = np.zeros((self._shape[0], len(self._rows)))
        for row, by_sample in self._current:
            slopes[:, row] += by_sample.cpu().numpy()
        self._slopes += list(slopes)
        self._losses += [total for total, _ in losses]
        self._tokens += [count for _, count in losses]
        del self._last, self._current

    def release(self) -> bool:
        held, self._graphs = self._graphs.tried, KeptGraphs(0)
        if held:
            self.keeps_graphs = False
        return self._source.release() or held

    def close(self) -> None:
        self._in_force.close()
        self._visits = []

    def result(self) -> "LinearSlopes":
        """Means over all samples."""
        slopes = np.array(distributed.gather_shares(self._slopes))
        tokens = np.array(distributed.gather_shares(self._tokens), dtype=np.float64)
        mixed = sorted(set().union(*distributed.gather(self._mixed)))
        total = check_predicted(int(tokens.sum()))
        loss = sum(distributed.gather_shares(self._losses)) / total
        return LinearSlopes(slopes, tokens, mixed, loss)

    def _backward(
        self,
        index: int,
        before: torch.Tensor,
        after: torch.Tensor | None,
        run: RunBlock,
        gradient: torch.Tensor,
    ) -> torch.Tensor:
        """
        Gradient before the block; the slopes of its Linears are added on the way.

        :param after: with the graph from `before` on; None to run the block again
        """
        if after is None:
            with self._differentiated(index), torch.enable_grad():
                before = before.detach().requires_grad_()
                after = run(before)
        (found,) = torch.autograd.grad(after, before, gradient)
        return found

    def _differentiated(self, index: int) -> AbstractContextManager[None]:
        """Under the weights of the source; the backward pass adds slopes."""
        weights, changes = self._source.with_changes(index)
        sinks = {
            name: partial(self._add_slope, index, name, change)
            for name, change in changes.items()
        }
        return differentiated(self._blocks.blocks[index].linears, weights, sinks)

    def _add_slope(
        self,
        index: int,
        name: str,
        how: Callable[[], Change | None],
        x: torch.Tensor,
        gradient: torch.Tensor,
    ) -> None:
        if (change := how()) is None:
            return
        full = self._blocks.blocks[index].full_name(name)
        row = self._rows[full]
        moved = x.matmul(change.matrix.to(x.device).t())
        wide = widest_float(moved.device)
        by_token = (gradient.float() * moved.float()).sum(dim=-1, dtype=wide)
        by_token *= change.factor
        # as the batch is, or all its tokens in a row, as OPT's MLP has them; experts
        # that see all of them by a router's choice have them in its order
        alike = [self._shape]
        if get_calibrate_all_experts_flag() or not EXPERT.search(full):
            alike.append(torch.Size([self._shape.numel()]))
        if by_token.shape in alike:
            by_sample = by_token.view(self._shape).sum(dim=1)
        else:
            by_sample = by_token.sum() / self._shape[0]
            self._mixed.add(row)
        self._current.append((row, by_sample))


@dataclass(frozen=True)
class LinearSlopes:
    """
    :param slopes: ∂(sum of losses)/∂s per sample and Linear, shape (samples, Linears)
    :param tokens: predicted tokens per sample, shape (samples,)
    :param mixed: columns whose tokens are of no known sample, so without an error
    :param loss: cross-entropy under the allocation itself, nats per token
    """

    slopes: np.ndarray
    tokens: np.ndarray
    mixed: list[int]
    loss: float

    def mean(self) -> np.ndarray:
        """∂loss/∂s of every Linear, nats per token, shape (Linears,)."""
        return self.slopes.sum(axis=0) / self.tokens.sum()

    def of_groups(self, groups: Groups) -> Slopes:
        """Per group, and per share of all weights."""
        share = groups.group_sizes / groups.group_sizes.sum()
        by_group = np.array([groups.total(one) for one in self.slopes])
        error = standard_error(by_group, self.tokens[:, None]) / share
        error[groups.of[self.mixed]] = np.nan
        return Slopes(groups.total(self.mean()) / share, error, self.loss)


class Gradient(Signal):
    """
    The slope under masks.

    :param step: δ/2: weights are looked at within so much of the threshold
    """

    name: ClassVar[str] = "gradient"
    differentiates: ClassVar[bool] = True

    step: float = Field(default=0.05, gt=0, lt=1)

    def stages(self, context: Context, rounds: int) -> list[Stage]:
        known = min(1.0, context.samples.signal_tokens(rounds) / ENOUGH)
        return [Stage(self.measurer(context), rounds, share=SHARE * known**0.5)]

    def measurer(self, context: Context) -> Callable[[np.ndarray], Slopes]:
        return partial(self._measure, context)

    def _measure(self, context: Context, allocation: np.ndarray) -> Slopes:
        source = MaskedSlopes(context.blocks, context.masks, allocation, self.step)
        return measured_slopes(context, source)


def measured_slopes(context: Context, source: SlopeSource) -> Slopes:
    """Of every group, on samples whose turn it is, under the weights of `source`."""
    probe = GradientProbe(context.blocks, source)
    if context.runner.out_of_memory:  # where an earlier round had to go on without
        probe.keeps_graphs = False
    found = context.runner.run("Loss slope", context.samples.next_signal(), probe)
    context.runner.out_of_memory |= not probe.keeps_graphs
    return found.of_groups(context.groups)
