"""LSA: sparsity by the error that pruning half of a Linear would make."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from absorb_plugin.names import Granularity
from absorb_plugin.precision import widest_float

from .base import Allocator, BaseAllocation, LinearGroup, Needs
from .owl import spread_metric

__all__ = ["Lsa", "reconstruction_error"]

# Rows of a weight that are pruned at a time; they do not depend on each other.
ROWS = 4096


class Lsa(Allocator):
    """
    LSA (https://openreview.net/forum?id=xq3lza5IjN, ICLR 2026; formulas as in the
    authors' repository BeiYazi0/LSA): a Linear's reconstruction error is
    E = ‖WXᵀ − (M⊙W)Xᵀ‖² = Σ_k Σ_{i,j pruned in row k} W_ki·W_kj·H_ij with H = XᵀX, for
    the mask M that removes the share p of every row greedily, see
    `reconstruction_error`. A block's E is the mean over its Linears. Importance is
    I_b = 1 − E_b/ΣE, u_b = 2β·(I_b − min I)/(max I − min I), and
    s_b = S + (mean u − u_b)·mean(N)/N_b with N the number of weights, which for blocks
    of one size is DLP's rule. So a larger error means more pruning: to the authors it
    is a sign of weights without outliers. The metric is E.

    The authors let β depend on the target: 0.02 to 0.06 below 60 %, 0.1 at 60 %, 0.15
    at 70 %, 0.12 at 80 %, and 0.07 where single Linears are ranked.

    :param beta: β; the sparsities spread over 2β
    :param fraction: p, the share of a row that is removed to measure the error
    :param group_size: columns among which the next weight to remove is sought
    """

    name: ClassVar[str] = "lsa"
    needs: ClassVar[Needs] = "gram"
    granularities: ClassVar[tuple[Granularity, ...]] = ("block", "linear")
    paper: ClassVar[str] = "https://openreview.net/forum?id=xq3lza5IjN"
    cost: ClassVar[str] = "one forward pass with XᵀX, a greedy pruning of every Linear"

    beta: float = Field(default=0.15, ge=0.0, le=0.5, allow_inf_nan=False)
    fraction: float = Field(default=0.5, gt=0.0, lt=1.0, allow_inf_nan=False)
    group_size: int = Field(default=128, ge=2)

    def measure(self, weight: torch.Tensor, gram: torch.Tensor) -> float:
        return reconstruction_error(weight, gram, self.fraction, self.group_size)

    def allocate(
        self, groups: Sequence[LinearGroup], sparsity: float
    ) -> BaseAllocation:
        errors = [_errors(group) for group in groups]
        metric = np.array([np.mean(list(one.values())) for one in errors])
        total = float(metric.sum())
        importance = 1 - metric / total if total > 0 else np.zeros_like(metric)
        sizes = np.array([group.parameters for group in groups], dtype=np.float64)
        change = spread_metric(importance, self.beta) * sizes.mean() / sizes
        return BaseAllocation(metric, np.clip(sparsity + change, 0.0, 1.0), errors)


def _errors(group: LinearGroup) -> dict[str, float]:
    found = {}
    for name, linear in group.linears.items():
        if linear.measured is None:
            raise ValueError("lsa needs the reconstruction errors of the Linears")
        found[name] = linear.measured
    return found


@torch.no_grad()
def reconstruction_error(
    weight: torch.Tensor,
    gram: torch.Tensor,
    fraction: float = 0.5,
    group_size: int = 128,
) -> float:
    """
    ‖(W − M⊙W)Xᵀ‖² of a mask that is found greedily, row by row. The columns are gone
    through in groups; of each the share `fraction` is removed, one weight after the
    other, always the one that adds least: removing j when P is gone adds
    W_j²·H_jj + 2·Σ_{i∈P} W_i·W_j·H_ij. What was removed from earlier groups counts.

    :param weight: (out_features, in_features)
    :param gram: H, float32 of shape (in_features, in_features)
    :param fraction: of each group, rounded down
    :param group_size: columns of a group; the last one may have fewer
    """
    rows = weight.split(ROWS)
    return max(
        0.0, sum(_rows_error(x.float(), gram, fraction, group_size) for x in rows)
    )


def _rows_error(
    weight: torch.Tensor, gram: torch.Tensor, fraction: float, group_size: int
) -> float:
    added = weight.square() * gram.diagonal()  # by removing this one next
    total = 0.0
    for start in range(0, weight.shape[1], group_size):
        stop = min(start + group_size, weight.shape[1])
        group, rest = slice(start, stop), slice(stop, None)
        count = int((stop - start) * fraction)
        removed, error = _remove(
            weight[:, group], added[:, group], gram[group, group], count
        )
        total += error
        added[:, rest] += 2 * weight[:, rest] * (removed @ gram[group, rest])
    return total


def _remove(
    weight: torch.Tensor, added: torch.Tensor, gram: torch.Tensor, count: int
) -> tuple[torch.Tensor, float]:
    """
    Of every row the `count` weights that add least; `added` is overwritten.

    :return: the weights that were removed, zero elsewhere, and what they added
    """
    removed = torch.zeros_like(weight)
    wide = widest_float(weight.device)
    total = weight.new_zeros((), dtype=wide)
    for _ in range(count):
        least, index = added.min(dim=1, keepdim=True)
        total += least.sum(dtype=wide)
        chosen = weight.gather(1, index)
        added += 2 * weight * chosen * gram[index[:, 0]]
        added.scatter_(1, index, torch.inf)
        removed.scatter_(1, index, chosen)
    return removed, float(total)
