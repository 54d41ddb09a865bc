"""
The method on one screen: calibration batches -> statistics -> base allocation -> signal
-> correction, judged on held-out samples -> confirmed by the pruner's own arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from loguru import logger
from transformers import PreTrainedModel

from absorb_plugin import distributed
from absorb_plugin.allocators.base_allocation import Base, base_allocation
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, SampleSplit, SampleUse, cut_tokens
from absorb_plugin.forward.grams import GramProbe
from absorb_plugin.forward.inputs import InputStatistics, unseen_linears
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.groups import Groups, named
from absorb_plugin.judges import MaskedLoss, PrunedLoss
from absorb_plugin.pruners import Pruner
from absorb_plugin.search.budget import Budget
from absorb_plugin.search.confirm import Confirmed, confirm
from absorb_plugin.search.correction import corrected
from absorb_plugin.search.line_search import Losses, SearchResult, line_search
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.signals import SIGNALS, Setting, Signal
from absorb_plugin.signals.noise import Noise, NoiseProfile

__all__ = ["Allocation", "allocate"]

# Samples of the noise probe where noise is not the signal: enough for the report.
REPORT_SAMPLES = 1
# Up to so many blocks the response takes no more block passes than the gradient.
RESPONSE_BLOCKS = 6


@dataclass(frozen=True)
class Allocation:
    """
    :param blocks: blocks and their prunable Linears
    :param level: of the correction, "block", "part" or "linear"
    :param signal: name of the signal
    :param budget: sizes of the Linears, S, bounds
    :param base: the base allocation
    :param sparsity: the final one, one sparsity per Linear in model order, shape (N,)
    :param direction: Δ of the first round, per Linear; zeros if nothing was measured
    :param noise: what the noise probe measured, if it ran
    :param noise_settings: its arguments
    :param search: the search, if strength is "auto"
    :param confirmed: the last comparison, if there was one
    :param samples: which calibration samples served what
    :param unseen: full names of the Linears (experts) that saw no token while the
        statistics were taken; None if none were taken
    """

    blocks: BlockMap
    level: str
    signal: str
    budget: Budget
    base: Base
    sparsity: np.ndarray
    direction: np.ndarray
    noise: NoiseProfile | None = None
    noise_settings: Noise = Noise()
    search: SearchResult | None = None
    confirmed: Confirmed | None = None
    samples: Sequence[SampleUse] = ()
    unseen: Sequence[str] | None = None

    def linear_sparsities(self) -> dict[str, float]:
        """Full name of every prunable Linear -> target; Σ p·s = S·Σ p."""
        return named(self.blocks, self.sparsity)

    def block_means(self, values: np.ndarray) -> np.ndarray:
        """Mean over the weights of every prunable block, of one number per Linear."""
        return Groups.at("block", self.blocks).mean(values)

    def achieved(self) -> float:
        """Mean target sparsity over all prunable weights."""
        return self.budget.mean(self.sparsity)


def allocate(
    model: PreTrainedModel,
    blocks: BlockMap,
    batches: Sequence[Batch],
    *,
    sparsity: float,
    pruner: Pruner,
    settings: AllocationSettings,
) -> Allocation:
    """
    :param model: the dense model; its weights are not touched
    :param blocks: its blocks, with the Linears that will be pruned
    :param batches: tokenised calibration batches, the same on all ranks
    :param sparsity: the budget S
    :param pruner: that will prune
    :param settings: the recipe's fields
    """
    signal, level = choose_signal(settings, blocks), choose_level(settings)
    judged = settings.strength == "auto"
    by_loss = judged or (settings.strength != 0 and signal.by_loss)
    effort = settings.measuring()
    samples = SampleSplit(batches, effort, judged=judged, by_loss=by_loss)
    runner = ProbeRunner(model, blocks, settings.probe_memory, settings.profile_cache)
    groups = Groups.at(level, blocks)
    budget = Budget.of(groups.sizes, sparsity, settings.max_sparsity)

    allocator = settings.base_allocator()
    statistics = {}
    if by_loss or allocator.needs == "activations":
        probe = InputStatistics(blocks)
        statistics = runner.run("Input statistics", samples.statistics, probe)
    measured = {}
    if allocator.needs == "gram":
        grams = GramProbe(blocks, allocator)
        measured = runner.run("Second moments", samples.statistics, grams)
    base = base_allocation(
        allocator,
        blocks,
        statistics,
        budget,
        measured=measured,
        granularity=settings.granularity,
        cache=runner.cache,
    )
    setting = Setting(blocks, groups, samples, runner, pruner, statistics)
    measure = partial(measure_direction, setting, signal)
    final, direction = base.sparsity, np.zeros_like(base.sparsity)
    search, confirmed = None, None
    if judged:
        rounds = 1 if signal.once else effort.rounds
        search = line_search(
            final, budget, measure, partial(masked_loss, setting), rounds=rounds
        )
        final, direction = search.sparsity, search.rounds[0].direction
        if effort.confirm and final is not base.sparsity:
            judge = partial(pruned_loss, setting)
            confirmed = confirm(final, base.sparsity, budget, judge)
            final = confirmed.sparsity
    elif settings.strength != 0:
        direction = measure(final)
        final = budget.meet(corrected(final, direction, float(settings.strength)))
    return Allocation(
        blocks=blocks,
        level=level,
        signal=signal.name,
        budget=budget,
        base=base,
        sparsity=distributed.from_first(final),
        direction=direction,
        noise=report_noise(settings, setting, signal),
        noise_settings=signal if isinstance(signal, Noise) else Noise(),
        search=search,
        confirmed=confirmed,
        samples=samples.uses(),
        unseen=unseen(blocks, statistics) if statistics else None,
    )


def choose_signal(settings: AllocationSettings, blocks: BlockMap) -> Signal:
    """
    :raises ValueError: naming a signal or an argument that there is not
    """
    name = settings.signal
    if name == "auto":
        name = "response" if len(blocks) <= RESPONSE_BLOCKS else "gradient"
    if name not in SIGNALS:
        raise ValueError(f"signal={name!r}: choose auto or one of {list(SIGNALS)}")
    return SIGNALS[name].made_with(settings.signal_args)


def choose_level(settings: AllocationSettings) -> str:
    """What `level: auto` stands for: what won in docs/benchmarks.md."""
    return "block" if settings.level == "auto" else settings.level


def measure_direction(
    setting: Setting, signal: Signal, allocation: np.ndarray
) -> np.ndarray:
    """Δ of every Linear, the same on all ranks."""
    allocation = distributed.from_first(allocation)
    return setting.groups.spread(signal.measure(setting, allocation))


def masked_loss(setting: Setting, candidates: Sequence[np.ndarray]) -> Losses:
    """Losses under masks on the samples of the search, the same on all ranks."""
    candidates = distributed.from_first(candidates)
    probe = MaskedLoss(
        setting.blocks, setting.pruner.masks, setting.statistics, candidates
    )
    return finite(setting.runner.run("Held-out loss", setting.samples.search, probe))


def pruned_loss(setting: Setting, candidates: Sequence[np.ndarray]) -> Losses:
    """Losses by the pruner's arithmetic on samples that chose nothing."""
    candidates, samples = distributed.from_first(candidates), setting.samples
    pruning = samples.pruning
    probe = PrunedLoss(setting.blocks, setting.pruner, candidates, len(pruning))
    what = f"Pruning as {setting.pruner.name} does"
    return finite(setting.runner.run(what, [*pruning, *samples.confirm], probe))


def finite(losses: Losses) -> Losses:
    """An overflow is the worst of losses, not none; ranks decide by the first's."""
    sums, tokens = distributed.from_first(losses)
    return np.where(np.isnan(sums), np.inf, sums), tokens


def report_noise(
    settings: AllocationSettings, setting: Setting, signal: Signal
) -> NoiseProfile | None:
    """The noise probe's profile, where it is the signal or a report wants it."""
    if settings.strength == 0:
        return None
    samples = setting.samples.in_turn()
    if isinstance(signal, Noise):
        return signal.profile(setting, samples)
    if settings.report_dir is None:
        return None
    tokens = settings.measuring().tokens
    few = [cut_tokens(sample, tokens) for sample in samples[:REPORT_SAMPLES]]
    return Noise().profile(setting, few)


def unseen(blocks: BlockMap, statistics: dict) -> list[str]:
    """Linears that saw no token, of which a warning tells."""
    found = unseen_linears(blocks, statistics)
    if found:
        logger.warning(
            f"{len(found)} of {len(blocks.linears())} Linears saw no token of the "
            f"statistics' calibration samples ({found[0]} …): "
            "experts that were never chosen, or Linears that the block does not "
            "call. If the pruner has no token for them either, the latter stay "
            "dense, and of the former Wanda zeroes the first columns and "
            "SparseGPT every weight. For experts use more samples, or "
            "oneshot(moe_calibrate_all_experts=True); profile.json lists them"
        )
    return found
