"""
Cheap masks: what a block's weights would be at a given sparsity.

Wanda leaves the weights it keeps as they are. SparseGPT changes them so that they make
up for the pruned ones, by the Hessian XᵀX of the Linear's inputs. Where the pruner does
so the masks do too, by the cheapest Hessian that knows of correlations: the exact
diagonal and a low-rank factor, H ≈ D + UUᵀ. With P the pruned and S the kept columns of
a row w,

    argmin over δ of ‖w − (w_S + δ)‖²_H  =  D_S⁻¹ U_S (I + U_Sᵀ D_S⁻¹ U_S)⁻¹ U_Pᵀ w_P

by Woodbury's identity: one small system a row.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch.nn.functional import linear as apply_linear

from absorb_plugin.sweep import replaced_forward

__all__ = ["BlockMasks", "Hessian"]


class Hessian:
    """
    XᵀX of a Linear's inputs as D + UUᵀ.

    :param square_sums: its diagonal a_j, shape (in_features,)
    :param factor: U, shape (in_features, rank)
    """

    DAMPING = 0.01  # of the mean diagonal, as in SparseGPT

    def __init__(self, square_sums: torch.Tensor, factor: torch.Tensor) -> None:
        damping = self.DAMPING * square_sums.mean()
        rest = square_sums - factor.square().sum(dim=1)
        # all-zero inputs: nothing to make up for, and no division by zero
        self._inverse = 1 / (rest.clamp(min=0) + damping).clamp(min=1e-30)
        self._factor = factor
        rank = factor.shape[1]
        self._upper = torch.triu_indices(rank, rank, device=factor.device)
        rows, columns = self._upper
        self._products = factor[:, rows] * factor[:, columns] * self._inverse[:, None]

    def made_up(self, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """
        :param weight: float32, shape (out_features, in_features)
        :param kept: bool of the same shape
        :return: the kept weights, changed to make up for the others; 0 elsewhere
        """
        factor, (rows, columns) = self._factor, self._upper
        rank = factor.shape[1]
        system = weight.new_zeros(len(weight), rank, rank)
        system[:, rows, columns] = system[:, columns, rows] = (
            kept.to(weight.dtype) @ self._products
        )
        system.diagonal(dim1=1, dim2=2).add_(1.0)
        missing = torch.where(kept, 0.0, weight) @ factor
        solved = torch.linalg.solve(system, missing)
        change = (solved @ factor.T) * self._inverse
        return torch.where(kept, weight + change, 0.0)


class BlockMasks:
    """
    Masked copies of one block's Linears, made while the block is onloaded.

    The score |W_ij|·√a_j is sorted once per Linear; any number of sparsities is then a
    threshold per row (arXiv 2306.11695). The weights themselves are never written: a
    Linear's `forward` is replaced while a mask is in force.

    :param linears: name -> Linear, all of one block
    :param input_square_sums: name -> a_j, shape (in_features,)
    :param factors: name -> U, shape (in_features, rank), of the Linears whose kept
        weights make up for the pruned ones
    """

    def __init__(
        self,
        linears: Mapping[str, torch.nn.Linear],
        input_square_sums: Mapping[str, torch.Tensor],
        factors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._linears = linears
        self._hessians: dict[str, Hessian] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._scores: dict[str, torch.Tensor] = {}
        self._sorted: dict[str, torch.Tensor] = {}
        for name, module in linears.items():
            weight = module.weight.detach()
            square_sums = input_square_sums[name].to(weight.device)
            self._weights[name] = weight
            self._scores[name] = weight.abs().float() * square_sums.sqrt()
            self._sorted[name] = _sorted_rows(self._scores[name])
            if factors is not None:
                factor = factors[name].to(weight.device)
                self._hessians[name] = Hessian(square_sums, factor)

    @contextmanager
    def applied(self, sparsities: Mapping[str, float]) -> Iterator[None]:
        """
        Within the context the block computes with masked weights.

        :param sparsities: name of a Linear -> sparsity in [0, 1]
        """
        weights = {name: self.masked(name, s) for name, s in sparsities.items()}
        with self.replaced(weights):
            yield

    @contextmanager
    def replaced(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within the context the Linears named compute with the weights given."""
        with ExitStack() as stack:
            for name, weight in weights.items():
                module = self._linears[name]
                stack.enter_context(replaced_forward(module, _forward(module, weight)))
            yield

    def masked(self, name: str, sparsity: float) -> torch.Tensor:
        """
        Weight of a Linear with the least ⌊columns·s⌋ scores of each row at zero, and
        the others as the pruner would leave them.
        """
        weight = self._weights[name]
        pruned = int(weight.shape[1] * sparsity)
        if pruned == 0:
            return weight
        threshold = self._sorted[name][:, pruned - 1 : pruned]
        kept = self._scores[name] > threshold
        if name not in self._hessians:
            return torch.where(kept, weight, 0)
        made_up = self._hessians[name].made_up(weight.float(), kept)
        return made_up.to(weight.dtype)

    def slope(
        self, name: str, sparsity: float, step: float, gradient: torch.Tensor
    ) -> float:
        """
        d/ds of ⟨gradient, weight at sparsity s⟩, from the weights at s ± `step`; at the
        ends of [0, 1] from what there is.
        """
        low, high = max(0.0, sparsity - step), min(1.0, sparsity + step)
        columns = self._weights[name].shape[1]
        ranks = int(columns * high) - int(columns * low)
        if ranks <= 0:
            return 0.0
        change = self.masked(name, high).float() - self.masked(name, low).float()
        return float((gradient.float() * change).sum()) * columns / ranks


def _sorted_rows(scores: torch.Tensor) -> torch.Tensor:
    if scores.device.type == "cpu":
        # numpy sorts with vector instructions: ten times as fast on a CPU with AVX2
        return torch.from_numpy(np.sort(scores.numpy(), axis=1))
    return scores.sort(dim=1).values


def _forward(module: torch.nn.Linear, weight: torch.Tensor) -> Callable:
    return lambda x: apply_linear(x, weight, module.bias)
