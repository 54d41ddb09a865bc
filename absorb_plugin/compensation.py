"""
SparseGPT's arithmetic, for rehearsals: what remains of a weight makes up for what is
pruned (arXiv 2301.00774).

llm-compressor's own function does the same one Linear at a time. Here the Linears that
share an input, as queries, keys and values do, share the inverse and the walk over the
columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["Compensation"]

GROUP = 32  # columns: what a processor's cache holds of many rows


class Compensation(NamedTuple):
    """
    Settings of SparseGPT.

    :param block_size: columns among which a share of the weights is pruned
    :param dampening: of the Hessian, relative to the mean of its diagonal
    """

    block_size: int = 128
    dampening: float = 0.01

    def pruned(
        self,
        weights: Sequence[torch.Tensor],
        sparsities: Sequence[float],
        inputs: torch.Tensor,
    ) -> list[torch.Tensor]:
        """
        :param weights: of Linears with the same input, each (out_features, in_features)
        :param sparsities: one per weight, in [0, 1)
        :param inputs: calibration inputs, (tokens, in_features)
        :return: pruned copies, in the weights' dtypes
        """
        inverse, dead = self._inverse(inputs.float())
        # columns are walked through one by one: they lie together here
        columns = torch.cat([weight.detach().float() for weight in weights]).t()
        columns = columns.clone(memory_format=torch.contiguous_format)
        columns[dead] = 0
        rows = [len(weight) for weight in weights]
        for start in range(0, len(columns), self.block_size):
            stop = min(start + self.block_size, len(columns))
            own = inverse[start:stop, start:stop]
            part, diagonal = columns[start:stop], own.diagonal()
            masks = [
                _least(scores, sparsity)
                for scores, sparsity in zip(
                    (part / diagonal[:, None]).square().split(rows, dim=1),
                    sparsities,
                    strict=True,
                )
            ]
            errors = _walk(part, torch.cat(masks, dim=1), own)
            columns[stop:] -= inverse[start:stop, stop:].t() @ errors
        return [
            part.t().to(weight.dtype)
            for part, weight in zip(columns.split(rows, dim=1), weights, strict=True)
        ]

    def _inverse(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Upper Cholesky factor of the inverse Hessian, (in_features, in_features), and
        the features that are always zero.
        """
        hessian = inputs.t() @ inputs
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1
        diagonal += self.dampening * diagonal.mean()
        try:
            # H = R Rᵀ with R upper is the Cholesky factorisation of H turned round;
            # R⁻¹ is the upper factor of H⁻¹, without H⁻¹ itself
            lower = torch.linalg.cholesky(hessian.flip(0, 1))
        except torch.linalg.LinAlgError:
            # as llm-compressor does, which warns of it in the run itself
            return torch.eye(len(hessian), device=hessian.device), dead
        one = torch.eye(len(lower), device=lower.device)
        turned = torch.linalg.solve_triangular(lower, one, upper=False)
        return turned.flip(0, 1), dead


def _least(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Where the least ⌊n·sparsity⌋ + 1 of n scores are: SparseGPT's threshold."""
    rank = int(scores.numel() * sparsity)
    flat = scores.flatten()
    if rank == len(flat):
        return torch.ones_like(scores, dtype=torch.bool)
    if flat.device.type == "cpu":  # numpy selects ten times as fast
        return scores <= float(np.partition(flat.numpy(), rank)[rank])
    return scores <= flat.kthvalue(rank + 1).values


def _walk(
    part: torch.Tensor, mask: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    """
    Prune some columns in place, each column's error going to those behind it: one by
    one to those of its group, at once to those behind the group.

    :param part: (columns, rows)
    :param mask: True where to prune, of the same shape
    :param inverse: (columns, columns), upper triangle
    :return: what columns behind `part` have to make up for, of its shape
    """
    errors = torch.zeros_like(part)
    share = mask / inverse.diagonal()[:, None]
    for start in range(0, len(part), GROUP):
        stop = min(start + GROUP, len(part))
        for i in range(start, stop):
            torch.mul(part[i], share[i], out=errors[i])
            behind = slice(i + 1, stop)
            part[behind].addr_(inverse[i, behind], errors[i], alpha=-1)
        part[stop:] -= inverse[start:stop, stop:].t() @ errors[start:stop]
    part[mask] = 0
    return errors
