"""The outcome of the method, and all that led to it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from absorb_plugin.allocators.base_allocation import Base
from absorb_plugin.blocks import BlockMap
from absorb_plugin.groups import Groups, named
from absorb_plugin.sample_split import SampleUse
from absorb_plugin.search.budget import Budget
from absorb_plugin.search.confirm import Confirmed
from absorb_plugin.search.line_search import SearchResult
from absorb_plugin.search.quality import Quality
from absorb_plugin.signals.noise import Noise, NoiseProfile

__all__ = ["Allocation"]


@dataclass(frozen=True)
class Allocation:
    """
    :param blocks: blocks and their prunable Linears
    :param level: of the correction, "block", "part" or "linear"
    :param signal: name of the signal
    :param budget: sizes of the Linears, S, bounds
    :param base: the base allocation
    :param sparsity: the final one, one sparsity per Linear in model order, shape (N,)
    :param direction: Δ of the first round, per Linear; None if none was measured, or
        each of several budgets had one of its own
    :param noise: what the noise probe measured, if it ran
    :param noise_settings: its arguments
    :param search: the search, if strength is "auto"
    :param confirmed: the last comparison, if there was one
    :param samples: which calibration samples served what
    :param quality: the search for the largest budget, if a loss was the aim
    :param unseen: full names of the Linears (experts) that saw no token while the
        statistics were taken; None if none were taken
    """

    blocks: BlockMap
    level: str
    signal: str
    budget: Budget
    base: Base
    sparsity: np.ndarray
    direction: np.ndarray | None
    noise: NoiseProfile | None = None
    noise_settings: Noise = Noise()
    search: SearchResult | None = None
    confirmed: Confirmed | None = None
    samples: Sequence[SampleUse] = ()
    quality: Quality | None = None
    unseen: Sequence[str] | None = None

    def linear_sparsities(self) -> dict[str, float]:
        """Full name of every prunable Linear -> target; Σ p·s = S·Σ p."""
        return named(self.blocks, self.sparsity)

    def block_means(self, values: np.ndarray) -> np.ndarray:
        """Mean over the weights of every prunable block, of one number per Linear."""
        return Groups.at("block", self.blocks).mean(values)

    def achieved(self) -> float:
        """Mean target sparsity over all prunable weights."""
        return self.budget.achieved(self.sparsity)
