"""
The method on one screen: calibration batches -> statistics -> base allocation -> signal
-> correction, judged on held-out samples -> confirmed by the pruner's own arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from loguru import logger
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.allocators.base_allocation import Base, base_allocation
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, cut_tokens, token_mask
from absorb_plugin.forward.check import check_forward
from absorb_plugin.forward.inputs import InputStatistics, unseen_linears
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.groups import Groups, named
from absorb_plugin.judges import MaskedLoss, PrunedLoss
from absorb_plugin.language_model import check_ids
from absorb_plugin.pruners import Pruner
from absorb_plugin.pruners.present import with_present_zeros
from absorb_plugin.sample_split import SampleSplit, SampleUse
from absorb_plugin.search.budget import Budget
from absorb_plugin.search.confirm import Confirmed, confirm
from absorb_plugin.search.correction import corrected
from absorb_plugin.search.descent import Slopes
from absorb_plugin.search.line_search import (
    Losses,
    SearchResult,
    descent_search,
    line_search,
)
from absorb_plugin.settings import AllocationSettings, Effort
from absorb_plugin.signals import SIGNALS, Setting, Signal
from absorb_plugin.signals.noise import Noise, NoiseProfile
from absorb_plugin.torch_state import check_differentiable, plain_torch

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
        return self.budget.achieved(self.sparsity)


@plain_torch()
def allocate(
    model: Module,
    blocks: BlockMap,
    batches: Sequence[Batch],
    *,
    sparsity: float,
    pruner: Pruner,
    settings: AllocationSettings,
) -> Allocation:
    """
    :param model: the dense model, wrapped or not; its weights are not touched
    :param blocks: its blocks, with the Linears that will be pruned
    :param batches: tokenised calibration batches, the same on all ranks
    :param sparsity: the budget S
    :param pruner: that will prune
    :param settings: the recipe's fields
    """
    signal, level = choose_signal(settings, blocks), choose_level(settings)
    judged = settings.strength == "auto"
    by_loss = needs_loss(settings, signal)
    effort = settings.measuring()
    check_ids(model, batches)
    prunes = (judged and effort.confirm > 0) or (by_loss and signal.prunes)
    samples = SampleSplit(
        batches,
        effort,
        judged=judged,
        by_loss=by_loss,
        pruning_tokens=pruner.judge_tokens(widest(blocks)) if prunes else None,
    )
    warn_of_few_tokens(pruner, blocks, batches)
    runner = ProbeRunner(model, blocks, settings.probe_memory, settings.profile_cache)
    groups = Groups.at(level, blocks)
    cap = Budget.of(groups.sizes, sparsity, settings.max_sparsity)
    budget = with_present_zeros(cap, blocks, pruner, {})

    if settings.strength != 0:
        if signal.differentiates:
            check_differentiable(model)
        with distributed.fail_together():
            check_forward(model, blocks, samples.shortest(), by_loss=by_loss)
    allocator = settings.base_allocator()
    statistics = {}
    if by_loss or allocator.needs == "activations":
        probe = InputStatistics(blocks)
        statistics = runner.run("Input statistics", samples.statistics, probe)
        if pruner.keeps_zeros:
            budget = with_present_zeros(cap, blocks, pruner, statistics)
    base = base_allocation(
        allocator,
        blocks,
        statistics,
        budget,
        granularity=settings.granularity,
        cache=runner.cache,
    )
    setting = Setting(blocks, groups, samples, runner, pruner, statistics)
    final, direction = base.sparsity, np.zeros_like(base.sparsity)
    search, confirmed = None, None
    if judged:
        search = search_correction(setting, signal, base, budget, effort)
        final, direction = search.sparsity, search.direction
        if effort.confirm and final is not base.sparsity:
            judge = partial(pruned_loss, setting)
            confirmed = confirm(final, base.sparsity, budget, judge)
            final = confirmed.sparsity
    elif settings.strength != 0:
        direction = measure_direction(setting, signal, final)
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


def needs_loss(settings: AllocationSettings, signal: Signal) -> bool:
    """Whether next-token loss is measured."""
    if settings.strength == "auto":
        return True
    return settings.strength != 0 and signal.by_loss


def choose_level(settings: AllocationSettings) -> str:
    """What `level: auto` stands for: what won in docs/benchmarks.md."""
    return "block" if settings.level == "auto" else settings.level


def warn_of_few_tokens(
    pruner: Pruner, blocks: BlockMap, batches: Sequence[Batch]
) -> None:
    """A Hessian of too few tokens makes a pruner that uses it worse than masks."""
    tokens = sum(int(token_mask(batch).sum()) for batch in batches)
    wanted = pruner.tokens_per_column * widest(blocks)
    if tokens < wanted:
        logger.warning(
            f"{pruner.modifier.__name__} prunes by {tokens} calibration tokens, and "
            f"the widest Linear has {widest(blocks)} columns: with fewer than {wanted} "
            "tokens it can be worse than Wanda. Raise num_calibration_samples or "
            "max_seq_length"
        )


def widest(blocks: BlockMap) -> int:
    """Columns of the widest Linear that will be pruned."""
    return max(linear.in_features for linear in blocks.linears().values())


def search_correction(
    setting: Setting, signal: Signal, base: Base, budget: Budget, effort: Effort
) -> SearchResult:
    """Down the slopes of a signal that has some, else along its direction."""
    judge = partial(masked_loss, setting)
    if signal.once:
        measure = partial(measure_direction, setting, signal)
        return line_search(base.sparsity, budget, measure, judge, rounds=1)
    return descent_search(
        base.sparsity,
        budget,
        partial(measure_slopes, setting, signal),
        judge,
        groups=setting.groups,
        rounds=effort.rounds,
    )


def measure_slopes(setting: Setting, signal: Signal, allocation: np.ndarray) -> Slopes:
    """The slopes of every group, the same on all ranks."""
    allocation = distributed.from_first(allocation)
    return distributed.from_first(signal.slopes(setting, allocation))


def measure_direction(
    setting: Setting, signal: Signal, allocation: np.ndarray
) -> np.ndarray:
    """Δ of every Linear, the same on all ranks."""
    allocation = distributed.from_first(allocation)
    direction = distributed.from_first(signal.direction(setting, allocation))
    return setting.groups.spread(direction)


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
