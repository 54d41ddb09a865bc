"""
The slope of the loss in every Linear's sparsity, from one backward pass.

The network runs under the weights W̃(s) that a pruner makes of an allocation, and the
cross-entropy is differentiated once:

    slope = ⟨∂loss/∂W̃, (W̃(s+δ) − W̃(s−δ)) / 2δ⟩

For a pruner that masks this is −Σ_band g_ij·w_ij / 2δ over the weights whose rank lies
within ±δ of the threshold: restoring a masked weight changes the loss by about
+g_ij·w_ij, masking a kept one by about −g_ij·w_ij, and the second-order terms of the
two have opposite signs. For SparseGPT it contains how the weights that remain make up
for the others. It costs four block passes per block (forward, recomputation, backward).
"""

from contextlib import ExitStack
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from compressed_tensors.offload import disable_offloading
from pydantic import Field
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.linears import differentiated, replaced_weights
from absorb_plugin.forward.loss import check_predicted, loss_gradient
from absorb_plugin.forward.probe import Needs, Probe, RunBlock
from absorb_plugin.groups import Groups, linear_names
from absorb_plugin.pruners.weights import MaskedSlopes, PrunedSlopes
from absorb_plugin.search.correction import direction_from_response
from absorb_plugin.signals.base import Setting, Signal
from absorb_plugin.signals.pruned_model import PrunedModel

__all__ = ["Gradient", "GradientProbe", "PrunerGradient"]


class GradientProbe(Probe):
    """
    Measures the slope of every prunable Linear.

    :param blocks: all blocks
    :param source: the weights under which the network runs, and how they change
    """

    state = ("_slopes", "_tokens", "_loss")

    def __init__(self, blocks: BlockMap, source: MaskedSlopes | PrunedSlopes) -> None:
        self._blocks, self._source = blocks, source
        self._rows = {name: row for row, name in enumerate(linear_names(blocks))}
        self._in_force = ExitStack()
        self._slopes: list[np.ndarray] = []
        self._tokens: list[int] = []
        self._loss = 0.0

    @property
    def needs(self) -> Needs:
        # inputs of all blocks, and two gradients
        return Needs(
            trajectories=len(self._blocks) + 2,
            pruned=3,
            backward=True,
            kept_weights=self._source.kept_weights,
        )

    def start(self, batch: Batch) -> None:
        self._visits: list[tuple[torch.Tensor, RunBlock]] = []

    def enter(self, index: int, block: Module) -> None:
        if not self._slopes:  # of the first batch
            self._source.rank(index)
        linears = self._blocks.blocks[index].linears
        weights = self._source.weights(index)
        self._in_force.enter_context(replaced_weights(linears, weights))

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self._in_force.close()
        self._visits.append((before, run))
        self._last = after

    def finish(self, batch: Batch, head: OutputHead) -> None:
        losses, gradient = loss_gradient(head, batch, self._last)
        self._slopes.append(np.zeros(len(self._rows)))
        for index in reversed(range(len(self._visits))):
            before, run = self._visits.pop()
            with disable_offloading():
                gradient = self._backward(index, before, run, gradient)
        self._tokens.append(sum(count for _, count in losses))
        self._loss += sum(total for total, _ in losses)
        del self._last

    def close(self) -> None:
        self._in_force.close()

    def result(self) -> np.ndarray:
        """∂loss/∂s of every prunable Linear, nats per token, shape (Linears,)."""
        slopes = distributed.gather_shares(self._slopes)
        tokens = sum(distributed.gather(sum(self._tokens)))
        return np.sum(slopes, axis=0) / check_predicted(tokens)

    def loss(self) -> float:
        """Cross-entropy under the allocation itself, nats per token."""
        return sum(distributed.gather(self._loss)) / sum(
            distributed.gather(sum(self._tokens))
        )

    def _backward(
        self, index: int, before: torch.Tensor, run: RunBlock, gradient: torch.Tensor
    ) -> torch.Tensor:
        """Gradient before the block; the slopes of its Linears are added on the way."""
        linears = self._blocks.blocks[index].linears
        weights = self._source.weights(index)
        sinks = {name: partial(self._add_slope, index, name) for name in weights}
        with differentiated(linears, weights, sinks), torch.enable_grad():
            source = before.detach().requires_grad_()
            (found,) = torch.autograd.grad(run(source), source, gradient)
        return found

    def _add_slope(self, index: int, name: str, gradient: torch.Tensor) -> None:
        row = self._rows[self._blocks.blocks[index].full_name(name)]
        self._slopes[-1][row] += self._source.along(index, name, gradient)


class Gradient(Signal):
    """
    The slope under masks.

    :param step: δ/2: weights are looked at within so much of the threshold
    """

    name: ClassVar[str] = "gradient"

    step: float = Field(default=0.05, gt=0, lt=1)

    def measure(self, setting: Setting, allocation: np.ndarray) -> np.ndarray:
        slopes = MaskedSlopes(setting.blocks, setting.masks, allocation, self.step)
        probe = GradientProbe(setting.blocks, slopes)
        found = setting.runner.run("Loss slope", setting.samples.next_signal(), probe)
        return direction_from_slopes(setting.groups, found)


class PrunerGradient(Gradient):
    """
    The slope through the pruner itself.

    :param step: δ: half the distance of the two sparsities whose weights are compared
    """

    name: ClassVar[str] = "pruner"

    def measure(self, setting: Setting, allocation: np.ndarray) -> np.ndarray:
        model = PrunedModel(setting.blocks, setting.pruner, allocation, self.step)
        slopes = setting.runner.run("Pruned model", setting.samples.pruning, model)
        probe = GradientProbe(setting.blocks, slopes)
        found = setting.runner.run("Loss slope", setting.samples.next_signal(), probe)
        return direction_from_slopes(setting.groups, found)


def direction_from_slopes(groups: Groups, slopes: np.ndarray) -> np.ndarray:
    """
    Δ of every group, from the slope of its weights: the budget is one of weights, so a
    small group that helps as much helps more.

    :param slopes: ∂loss/∂s of every Linear, shape (N,)
    """
    return direction_from_response(groups.total(slopes) / groups.group_sizes)
