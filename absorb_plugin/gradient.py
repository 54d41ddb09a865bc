"""
The slope of the loss in every block's sparsity, from one backward pass.

The network runs under the masks of an allocation, as for the in-situ response, but
instead of relaxing one block after the other the cross-entropy is differentiated once.
Let g_ij = ∂loss/∂w_ij at the masked weights. Restoring a masked weight changes the loss
by about +g_ij·w_ij, masking a kept one by about −g_ij·w_ij; the second-order terms of
the two have opposite signs. So over the band of weights whose rank lies within ±δ of
the threshold

    slope_l = −Σ_band g_ij·w_ij / (2δ·p_l)

is a central estimate of ∂loss/∂s_l per weight. It costs four block passes per block
(forward, recomputation, backward), where the response costs (L+1)/2.
"""

from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np
import torch
from compressed_tensors.offload import disable_offloading
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch
from absorb_plugin.loss import check_predicted, cross_entropy_sums
from absorb_plugin.masks import replaced_weights
from absorb_plugin.response import MaskedPassenger
from absorb_plugin.sweep import RunBlock, Tail

__all__ = ["GradientProbe"]


class GradientProbe(MaskedPassenger):
    """
    Passenger of a sweep that measures the slope of every prunable block.

    :param sparsities: the allocation under which the network runs, one per prunable
        block
    :param step: δ, half-width of the band of weights around the threshold
    """

    kept = ("_slopes", "_tokens", "_loss")
    differentiates = True

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
        self.trajectories = len(blocks) + 2  # inputs of all blocks, and two gradients
        self._slopes: list[np.ndarray] = []
        self._tokens: list[int] = []
        self._loss = 0.0

    def start(self, batch: Batch) -> None:
        self._visits: list[tuple[torch.Tensor, RunBlock]] = []

    def enter(self, index: int, block: Module) -> None:
        if index in self._rows:
            self._in_force.enter_context(
                self._masks(index).applied(self._at(index, self._sparsities))
            )

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self._in_force.close()
        self._visits.append((before, run))
        self._last = after

    def finish(self, batch: Batch, tail: Tail) -> None:
        with disable_offloading():  # the head, once for all chunks
            losses, gradient = _loss_gradient(tail, batch, self._last)
        slopes = np.zeros(len(self._rows))
        for index in reversed(range(len(self._visits))):
            before, run = self._visits.pop()
            with disable_offloading():
                gradient, slope = self._backward(index, before, run, gradient)
            if index in self._rows:
                slopes[self._rows[index]] = slope
        self._slopes.append(slopes)
        self._tokens.append(sum(count for _, count in losses))
        self._loss += sum(total for total, _ in losses)
        del self._last

    def slope(self) -> np.ndarray:
        """∂loss/∂s_l per weight, nats per token, shape (prunable blocks,)."""
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
    ) -> tuple[torch.Tensor, float]:
        """Gradient before the block, and the sum over the band of its weights."""
        masks = self._masks(index) if index in self._rows else None
        with ExitStack() as stack:
            weights: dict[str, torch.Tensor] = {}
            if masks is not None:
                sparsities = self._at(index, self._sparsities)
                weights = {
                    name: masks.masked(name, s).detach().clone().requires_grad_()
                    for name, s in sparsities.items()
                }
                linears = self._blocks.blocks[index].linears
                stack.enter_context(replaced_weights(linears, weights))
            stack.enter_context(torch.enable_grad())
            source = before.detach().requires_grad_()
            inputs = [source, *weights.values()]
            gradients = torch.autograd.grad(
                run(source), inputs, gradient, allow_unused=True
            )
        if masks is None:
            return gradients[0], 0.0
        size = self._blocks.blocks[index].parameters
        total = 0.0
        for (name, s), grad in zip(sparsities.items(), gradients[1:], strict=True):
            if grad is not None:  # an expert that saw no token has none
                total -= masks.band_sum(name, s, self._step, grad)
        return gradients[0], total / (2 * self._step * size)


def _loss_gradient(
    tail: Tail, batch: Batch, hidden: torch.Tensor
) -> tuple[list[tuple[float, int]], torch.Tensor]:
    """Cross-entropy sums per sample and the gradient of their total in `hidden`."""
    leaf = hidden.detach().requires_grad_()
    total = torch.zeros_like(leaf)

    def accumulate(loss: torch.Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, leaf)
        total.add_(gradient)

    with torch.enable_grad():
        losses = cross_entropy_sums(tail, batch, leaf, accumulate)
    return losses, total
