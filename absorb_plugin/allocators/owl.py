"""OWL: prune less where more weights stand out; and helpers that DLP and LSA share."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from absorb_plugin import distributed
from absorb_plugin.names import Granularity
from absorb_plugin.precision import widest_float

from .base import Allocator, BaseAllocation, LinearGroup, Needs
from .base import LinearStatistics as Linear

__all__ = ["Owl", "importance", "mean_importance", "of_all", "spread_metric"]


class Owl(Allocator):
    """
    OWL (https://arxiv.org/abs/2310.05175): with M_b all |W|·√a over the Linears of a
    block, D_b = 100·fraction(M_b > m·mean M_b), u_b = 2λ·(D_b − min D)/(max D − min D)
    and s_b = 1 − (u_b − mean u + 1 − S). Its metric is D in percent.

    :param m: how many times the mean an outlier exceeds
    :param lmbda: λ; the sparsities spread over 2λ
    """

    name: ClassVar[str] = "owl"
    needs: ClassVar[Needs] = "activations"
    granularities: ClassVar[tuple[Granularity, ...]] = ("block", "linear")
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.05175"
    cost: ClassVar[str] = "one forward pass, two reads of the weights"

    m: float = Field(default=5.0, gt=0.0, allow_inf_nan=False)
    lmbda: float = Field(default=0.08, ge=0.0, le=0.5, allow_inf_nan=False)

    def allocate(
        self, groups: Sequence[LinearGroup], sparsity: float
    ) -> BaseAllocation:
        outliers = of_all(groups, partial(_outlier_percent, m=self.m))
        change = spread_metric(outliers, self.lmbda)
        return BaseAllocation(outliers, np.clip(sparsity + change, 0.0, 1.0))


def spread_metric(metric: np.ndarray, width: float) -> np.ndarray:
    """
    mean u − u_b with u_b = 2·width·(metric − min)/(max − min): how much more than the
    target each group is pruned. Equal metrics give zeros.
    """
    spread = float(metric.max() - metric.min())
    if spread == 0.0:
        return np.zeros_like(metric)
    u = 2 * width * (metric - metric.min()) / spread
    return u.mean() - u


def of_all(
    groups: Sequence[LinearGroup], measure: Callable[[LinearGroup], float]
) -> np.ndarray:
    """
    One number per group. Under torch.distributed each rank reads the weights of its
    share of the groups.
    """
    with distributed.fail_together():
        mine = [measure(group) for group in distributed.share(groups)]
    return np.array(distributed.gather_shares(mine))


def mean_importance(group: LinearGroup) -> float:
    """Mean of |W|·√a over all Linears of a group."""
    sums = [_importance_sum(linear) for linear in group.linears.values()]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _outlier_percent(group: LinearGroup, m: float) -> float:
    threshold = m * mean_importance(group)
    counts = [_count_above(linear, threshold) for linear in group.linears.values()]
    return 100.0 * sum(above for above, _ in counts) / sum(n for _, n in counts)


# One function call per Linear, so that what it holds is gone before the next is read.


def _importance_sum(linear: Linear) -> tuple[float, int]:
    """Σ |W|·√a from the column sums of |W|, and the number of weights."""
    weight = linear.weight
    wide = widest_float(weight.device)
    columns = weight.abs().sum(dim=0, dtype=wide)
    return float(columns @ _input_norm(linear, weight).to(wide)), weight.numel()


def _count_above(linear: Linear, threshold: float) -> tuple[int, int]:
    """How many |W|·√a exceed the threshold, and the number of weights."""
    values = importance(linear)
    return int((values > threshold).sum()), values.numel()


def importance(linear: Linear) -> torch.Tensor:
    """|W|·√a, float32 of the weight's shape."""
    weight = linear.weight
    return weight.abs().float().mul_(_input_norm(linear, weight))


def _input_norm(linear: Linear, weight: torch.Tensor) -> torch.Tensor:
    """√a, float32, on the device of the weight."""
    if linear.input_square_sum is None:
        raise ValueError("this allocator needs the statistics of the Linears' inputs")
    return linear.input_square_sum.to(weight.device, torch.float32).sqrt()
