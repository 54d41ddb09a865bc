"""What an allocator is: arguments, the statistics it needs, and one function."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from absorb_plugin.names import Granularity

__all__ = [
    "Allocator",
    "BaseAllocation",
    "LinearGroup",
    "LinearStatistics",
    "Remember",
]

Needs = Literal["none", "weights", "activations", "gram"]
Remember = Callable[[str, Callable[[], float]], float]


def _compute(name: str, compute: Callable[[], float]) -> float:
    return compute()


@dataclass(frozen=True)
class LinearStatistics:
    """
    One Linear as an allocator sees it.

    :param module: the Linear; it may be offloaded, so `weight` is fetched on access
        and should be read once, used, and let go
    :param input_square_sum: a_j = mean over calibration samples of Σ_tokens x_j²,
        float32 of shape (in_features,), on the weight's device; None unless the
        allocator needs "activations"
    :param remember: (name, compute) -> the number that `compute` returns, or returned
        in an earlier run with the same `profile_cache`. For what takes long and
        depends on the weight alone; put every argument that it depends on in the name
    :param measured: what the allocator's `measure` returned for this Linear; None
        unless it needs "gram"
    """

    module: torch.nn.Module
    input_square_sum: torch.Tensor | None = None
    remember: Remember = _compute
    measured: float | None = None

    @property
    def weight(self) -> torch.Tensor:
        """
        The weight, shape (out_features, in_features), in the model's dtype. It is the
        model's own, where that is not offloaded: do not write to it.
        """
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach()


@dataclass(frozen=True)
class LinearGroup:
    """
    Linears that share one sparsity: a decoder block, or a single Linear.

    :param name: full module name of the block or of the Linear
    :param linears: name relative to the block -> statistics, in module order; never
        empty
    :param parameters: number of prunable weights in the group (p_b)
    """

    name: str
    linears: Mapping[str, LinearStatistics]
    parameters: int


@dataclass(frozen=True)
class BaseAllocation:
    """
    What an allocator returns.

    :param metric: one finite value per group, in the allocator's own unit, shape (G,)
    :param sparsity: one base sparsity per group in [0, 1], shape (G,). It need not
        meet the budget exactly: the budget step, shared by all allocators, follows.
    :param linear_metrics: per group, Linear name -> metric, where the allocator has
        one metric for each Linear
    """

    metric: np.ndarray
    sparsity: np.ndarray
    linear_metrics: Sequence[Mapping[str, float]] = field(default_factory=tuple)


class Allocator(BaseModel):
    """
    Base class of all allocators. The pydantic fields of a subclass are its arguments
    (`allocator_args` of the modifier, `--set key=value` of the CLI).

    Class attributes:
        name: how recipes call it
        needs: statistics to collect: "none", "weights", "activations", or "gram" for
            the second moments of the inputs, which only `measure` gets to see
        granularities: which groups it can rank
        paper: URL of its source
        cost: what it costs beside pruning, in words
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    needs: ClassVar[Needs] = "none"
    granularities: ClassVar[tuple[Granularity, ...]] = ("block",)
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = ""

    def identity(self) -> list[object]:
        """What makes two of them equal (`fingerprint.digest`)."""
        return [self.name, self.model_dump()]

    def measure(self, weight: torch.Tensor, gram: torch.Tensor) -> float:
        """
        For those that need "gram": one number of a Linear, as soon as its inputs are
        known. Neither argument is kept, so one block's are in memory at a time.

        :param weight: (out_features, in_features), in the model's dtype. It is the
            model's own: do not write to it
        :param gram: mean over calibration samples of Σ_tokens x xᵀ, float32 of shape
            (in_features, in_features), on the weight's device; yours to write to
        :return: `LinearStatistics.measured`
        """
        raise NotImplementedError

    def allocate(
        self, groups: Sequence[LinearGroup], sparsity: float
    ) -> BaseAllocation:
        """
        :param groups: G groups in model order
        :param sparsity: the global target S in [0, 1)
        :return: metric and base sparsity of every group
        """
        raise NotImplementedError
