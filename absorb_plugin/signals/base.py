"""What a signal is: what it measures with, and the direction that it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from absorb_plugin.blocks import BlockMap
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.groups import Groups
from absorb_plugin.mistakes import argument_problem
from absorb_plugin.pruners.base import Pruner
from absorb_plugin.pruners.masks import MaskedWeights
from absorb_plugin.sample_split import SampleSplit
from absorb_plugin.search.correction import direction_from_response
from absorb_plugin.search.descent import Slopes, Stage

__all__ = ["Context", "Signal"]


@dataclass(frozen=True)
class Context:
    """
    What a signal measures with, and judges by loss too.

    :param blocks: all blocks
    :param groups: what is corrected alike
    :param samples: which serve what
    :param runner: runs probes
    :param pruner: that will prune
    :param statistics: full name of a Linear -> a_j of the dense network
    :param quantiles: of the scores by which weights are masked, found out once for all
        rounds (`MaskedWeights`)
    :param known: signal -> what it has measured, of those that measure once
    """

    blocks: BlockMap
    groups: Groups
    samples: SampleSplit
    runner: ProbeRunner
    pruner: Pruner
    statistics: Mapping[str, torch.Tensor]
    quantiles: dict[str, torch.Tensor] = field(default_factory=dict)
    known: dict[Signal, Any] = field(default_factory=dict)

    @property
    def masks(self) -> MaskedWeights:
        """Masked weights, with thresholds of their own."""
        return MaskedWeights(
            self.blocks,
            self.pruner.masks,
            self.statistics,
            self.quantiles,
            self.runner.joins_rows,
        )


class Signal(BaseModel):
    """
    Base class of all signals. The pydantic fields of a subclass are its arguments
    (`signal_args` of the modifier).

    Class attributes:
        name: how recipes call it
        by_loss: whether it needs tokens to predict, and the inputs' statistics
        prunes: whether it needs samples to prune by
        once: whether it says the same of every allocation, and gives a direction only
        differentiates: whether it runs backward, so that the model has to allow that
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    by_loss: ClassVar[bool] = True
    prunes: ClassVar[bool] = False
    once: ClassVar[bool] = False
    differentiates: ClassVar[bool] = False

    def measurer(self, context: Context) -> Callable[[np.ndarray], Slopes]:
        """
        Of a signal that is not `once`: what takes an allocation, one sparsity per
        Linear, and gives the slopes of every group under it. One serves a whole
        descent.
        """
        raise NotImplementedError

    def direction(self, context: Context, allocation: np.ndarray) -> np.ndarray:
        """Δ of every group, negative for those that are to be pruned less."""
        return direction_from_response(self.measurer(context)(allocation).mean)

    def stages(self, context: Context, rounds: int) -> list[Stage]:
        """
        Of a descent by this signal.

        :param rounds: steps that `effort` allows
        """
        return [Stage(self.measurer(context), rounds)]

    @classmethod
    def made_with(cls, arguments: Mapping[str, object]) -> Signal:
        """:raises ValueError: naming an argument that it has not, or its wrong value"""
        try:
            return cls(**arguments)
        except ValidationError as error:
            told = "; ".join(argument_problem(cls, one) for one in error.errors())
            raise ValueError(f"signal_args of signal {cls.name!r}: {told}") from error
