"""
The slope of the loss through the pruner's own arithmetic (signals/gradient.py), before
a pruner whose update repairs what it prunes.
"""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
from pydantic import Field

from absorb_plugin.pruners.slopes import PrunedSlopes
from absorb_plugin.search.descent import Slopes, Stage
from absorb_plugin.signals.base import Context
from absorb_plugin.signals.gradient import Gradient, measured_slopes
from absorb_plugin.signals.pruned_model import PrunedModel

__all__ = ["PrunerGradient"]

# Before a pruner that repairs, masks lead in fewer and longer steps, and of their way a
# share is taken; then come the steps by that pruner's own slopes (`search.descent`).
ROUNDS_OF_MASKS = 2 / 3
LENGTHS_OF_MASKS = (0.084, 0.014)
SHARE_OF_MASKS = 0.7
LENGTHS_AFTER_MASKS = (0.03, 0.012)


class PrunerGradient(Gradient):
    """
    The slope through the pruner itself, from where masks lead. Masks know where the
    network is sensitive and cost little; not knowing what the pruner repairs they go
    too far, so a part of their way is taken, and the pruner's slopes lead on.

    :param step: δ: half the distance of the two sparsities whose weights are compared
    :param refresh: rounds after which the pruner makes the weights anew; in between
        they are interpolated
    """

    name: ClassVar[str] = "pruner"
    prunes: ClassVar[bool] = True

    refresh: int = Field(default=6, ge=1)

    def measurer(self, context: Context) -> Callable[[np.ndarray], Slopes]:
        return _PrunerSlopes(context, self).measure

    @staticmethod
    def shared_out(rounds: int) -> tuple[int, int]:
        """In how many rounds masks lead, and in how many the pruner after them."""
        return max(1, round(rounds * ROUNDS_OF_MASKS)), max(1, rounds // 2)

    def stages(self, context: Context, rounds: int) -> list[Stage]:
        masks = Gradient(step=self.step).measurer(context)
        first, own = self.shared_out(rounds)
        return [
            Stage(masks, first, LENGTHS_OF_MASKS, SHARE_OF_MASKS),
            Stage(self.measurer(context), own, LENGTHS_AFTER_MASKS),
        ]


class _PrunerSlopes:
    """The slopes of one descent through the pruner's weights."""

    def __init__(self, context: Context, signal: PrunerGradient) -> None:
        self._setting, self._signal = context, signal
        self._made: PrunedSlopes | None = None
        self._age = 0

    def measure(self, allocation: np.ndarray) -> Slopes:
        if self._made is None or self._age == self._signal.refresh:
            self._made, self._age = None, 0  # let go before the new ones are made
            self._made = self._prune(allocation)
        self._age += 1
        return measured_slopes(self._setting, self._made.at(allocation))

    def _prune(self, allocation: np.ndarray) -> PrunedSlopes:
        context, samples = self._setting, self._setting.samples.next_pruning()
        model = PrunedModel(
            context.blocks, context.pruner, allocation, self._signal.step
        )
        model.joined = context.runner.joins_rows
        model.room = context.runner.spare(model.needs, samples)
        what = f"Pruning as {context.pruner.name} does"
        return context.runner.run(what, samples, model)
