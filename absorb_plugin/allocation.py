"""The stations of the method between calibration batches and targets per Linear."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from datasets import Dataset
from loguru import logger
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from absorb_plugin import distributed
from absorb_plugin._llmcompressor import linearize_moe
from absorb_plugin.absorption import AbsorptionProfile, NoiseProbe, until_known
from absorb_plugin.allocators.base import Allocator, BaseAllocation, LinearGroup
from absorb_plugin.blocks import BlockMap, find_blocks, linear_parameters
from absorb_plugin.budget import check_budget, meet_budget
from absorb_plugin.cache import ProfileCache
from absorb_plugin.calibration import (
    content,
    cut_tokens,
    in_fixed_order,
    interleaved,
    join_samples,
    padded,
    samples_of,
    single_samples,
    spread,
)
from absorb_plugin.compensation import Compensation
from absorb_plugin.correction import direction_from_ratio, direction_from_response
from absorb_plugin.devices import compute_on_one_device
from absorb_plugin.gradient import GradientProbe
from absorb_plugin.plugins import owner_of, run_allocator
from absorb_plugin.rehearsal import Rehearsal
from absorb_plugin.response import CandidateScores, ResponseProbe
from absorb_plugin.statistics import InputStatistics, groups_of, unseen_linears
from absorb_plugin.strength import Score, Search
from absorb_plugin.sweep import Passenger, sweep

if TYPE_CHECKING:
    from absorb_plugin.modifier import AbsorptionAllocationModifier

__all__ = [
    "Allocation",
    "Base",
    "Calibration",
    "allocate_model",
    "as_dict",
    "base_allocation",
    "render",
]

# Samples of the noise probe where noise is not the signal: enough for the report.
REPORT_SAMPLES = 1
# Up to so many blocks the response takes no more block passes than the gradient.
RESPONSE_BLOCKS = 6


@dataclass(frozen=True)
class Base:
    """
    The base allocation, budget met.

    :param sparsity: per prunable block, shape (L,)
    :param metric: the allocator's metric per block, shape (L,)
    :param offsets: full name of a Linear -> its sparsity minus that of its block; empty
        at granularity "block"
    :param linear_metrics: full name of a Linear -> metric, where there is one
    """

    sparsity: np.ndarray
    metric: np.ndarray
    offsets: Mapping[str, float]
    linear_metrics: Mapping[str, float]


@dataclass(frozen=True)
class Allocation:
    """
    What `AbsorptionAllocationModifier.allocate` found.

    :param blocks: blocks and their prunable Linears
    :param budget: S
    :param base: the base allocation
    :param absorption: the noise probe's profile, if it ran
    :param max_sparsity: cap of every Linear
    :param sparsity: final sparsity per prunable block, shape (L,)
    :param direction: Δ of the first round, shape (L,); zeros if nothing was measured
    :param search: the strength search, if there was one
    :param unseen: full names of the Linears (experts) that saw no token while the
        statistics were taken; None if none were taken
    """

    blocks: BlockMap
    budget: float
    base: Base
    absorption: AbsorptionProfile | None
    max_sparsity: float
    sparsity: np.ndarray
    direction: np.ndarray
    search: Search | None = None
    unseen: Sequence[str] | None = None

    def linear_sparsities(self) -> dict[str, float]:
        """Full name of every prunable Linear -> target; Σ p·s = S·Σ p."""
        names, sizes, wished = [], [], []
        for row, index in enumerate(self.blocks.prunable):
            block = self.blocks.blocks[index]
            for name, linear in block.linears.items():
                full = block.full_name(name)
                names.append(full)
                sizes.append(linear_parameters(linear))
                wished.append(self.sparsity[row] + self.base.offsets.get(full, 0.0))
        targets = np.array(wished)
        if self.base.offsets:
            targets = meet_budget(
                targets, np.array(sizes), self.budget, self.max_sparsity
            )
        return dict(zip(names, targets.tolist(), strict=True))

    def block_sparsities(self) -> list[float]:
        """
        Mean target of every prunable block: `sparsity`, but for what single Linears at
        the cap had to leave to others.
        """
        if not self.base.offsets:
            return self.sparsity.tolist()
        targets = self.linear_sparsities()
        means = []
        for index in self.blocks.prunable:
            block = self.blocks.blocks[index]
            total = sum(
                targets[block.full_name(name)] * linear_parameters(linear)
                for name, linear in block.linears.items()
            )
            means.append(total / block.parameters)
        return means

    def achieved(self) -> float:
        """Mean target sparsity over all prunable weights."""
        targets = self.linear_sparsities()
        sizes = {
            name: linear_parameters(linear)
            for name, linear in self.blocks.linears().items()
        }
        total = sum(sizes.values())
        return sum(targets[name] * size for name, size in sizes.items()) / total


def base_allocation(
    allocator: Allocator,
    blocks: BlockMap,
    statistics: Mapping[str, torch.Tensor],
    sparsity: float,
    granularity: str,
    max_sparsity: float,
    cache: ProfileCache | None = None,
) -> Base:
    """Ask the allocator, and meet the budget."""
    if allocator.needs == "weights":
        _check_finite(blocks)  # else the forward pass of the statistics tells
    remember = None if cache is None else cache.numbers_for(owner_of(allocator))
    groups = groups_of(blocks, statistics, granularity, remember)
    found = distributed.from_first(run_allocator(allocator, groups, sparsity))
    sizes = np.array([group.parameters for group in groups])
    met = meet_budget(found.sparsity, sizes, sparsity, max_sparsity)
    if granularity == "block":
        metrics = _named_metrics(groups, found)
        return Base(met, np.asarray(found.metric, dtype=np.float64), {}, metrics)
    targets = dict(zip((group.name for group in groups), met.tolist(), strict=True))
    metrics = dict(
        zip((group.name for group in groups), np.asarray(found.metric), strict=True)
    )
    block_sparsity, block_metric = [], []
    offsets: dict[str, float] = {}
    for index in blocks.prunable:
        block = blocks.blocks[index]
        names = [block.full_name(name) for name in block.linears]
        shares = [
            linear_parameters(linear) / block.parameters
            for linear in block.linears.values()
        ]
        mean = float(np.dot(shares, [targets[name] for name in names]))
        block_sparsity.append(mean)
        block_metric.append(float(np.mean([metrics[name] for name in names])))
        offsets |= {name: targets[name] - mean for name in names}
    return Base(np.array(block_sparsity), np.array(block_metric), offsets, metrics)


def _check_finite(blocks: BlockMap) -> None:
    for name, linear in blocks.linears().items():
        if not torch.isfinite(linear.weight).all():
            raise ValueError(
                f"the weight of {name} holds NaN or infinity: check the checkpoint and "
                "the dtype that it is loaded in"
            )


def _named_metrics(
    groups: Sequence[LinearGroup], found: BaseAllocation
) -> dict[str, float]:
    if not found.linear_metrics:
        return {}
    return {
        f"{group.name}.{name}": float(metric)
        for group, metrics in zip(groups, found.linear_metrics, strict=True)
        for name, metric in metrics.items()
    }


class Calibration:
    """
    The calibration samples and what is run on them. With `strength: auto` some are
    held out: at even distances, at most half, and used for nothing but `score`.

    Under torch.distributed every rank holds all samples, makes the same choices, and
    runs its share of the samples chosen; the passengers put the results together.

    :param batches: the same on all ranks
    :param settings: the modifier, for its fields
    :raises ValueError: if strength is "auto" and there is but one sample
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: BlockMap,
        batches: Sequence[Mapping[str, torch.Tensor]],
        settings: "AbsorptionAllocationModifier",
    ) -> None:
        self._model, self._blocks, self._settings = model, blocks, settings
        self.signal = settings.signal
        if settings.signal == "auto":
            few = len(blocks) <= RESPONSE_BLOCKS
            self.signal = "response" if few else "gradient"
        # of the pruned network, under masks: for a signal, or to judge strengths
        self._by_loss = settings.strength != 0 and (
            self.signal != "noise" or settings.strength == "auto"
        )
        tokens = settings.probe_tokens if self._by_loss else None
        samples = in_fixed_order(single_samples(batches, tokens))
        self.samples = len(samples)
        _check_alike(samples)
        self._held_out: list[dict] = []
        if settings.strength == "auto":
            if self.samples < 2:
                raise ValueError(
                    "strength='auto' holds calibration samples out to judge by, and "
                    "there is but one: raise num_calibration_samples, or give strength "
                    "as a number (0.1 is a good start)"
                )
            count = min(settings.holdout_samples, self.samples // 2)
            held_out = spread(samples, count)
            out = {id(sample) for sample in held_out}
            samples = [sample for sample in samples if id(sample) not in out]
            self._held_out = [cut_tokens(x, settings.probe_tokens) for x in held_out]
        self._samples = samples
        self._measured = 0
        self.unseen: list[str] | None = None
        self.cache: ProfileCache | None = None
        if settings.profile_cache is not None:
            self.cache = ProfileCache(settings.profile_cache, model)

    def statistics(self, for_allocator: bool) -> dict[str, torch.Tensor]:
        """
        Σ x² of the Linears' inputs, where the masks of a signal need it.

        :param for_allocator: whether the base allocator needs it too
        """
        settings = self._settings
        if not (self._by_loss or for_allocator):
            return {}
        chosen = spread(self._samples, settings.statistics_samples)
        watcher = InputStatistics(self._blocks)
        self._sweep(chosen, watcher, "Input statistics")
        sums = watcher.input_square_sums()
        self.unseen = unseen_linears(self._blocks, sums)
        if self.unseen:
            logger.warning(
                f"{len(self.unseen)} of {len(self._blocks.linears())} Linears saw no "
                f"token of {len(chosen)} calibration samples ({self.unseen[0]} …): "
                "experts that were never chosen, or Linears that the block does not "
                "call. If the pruner has no token for them either, the latter stay "
                "dense, and of the former Wanda zeroes the first columns and "
                "SparseGPT every weight. For experts use more samples, or "
                "oneshot(moe_calibrate_all_experts=True); profile.json lists them"
            )
        return sums

    def absorption(self) -> AbsorptionProfile | None:
        """The noise probe, where it is the signal or a report wants it."""
        settings = self._settings
        if settings.strength == 0:
            return None
        samples, count = interleaved(self._samples), settings.noise_samples
        if self.signal != "noise":
            if settings.report_dir is None:
                return None
            few = samples[:REPORT_SAMPLES]
            samples = [cut_tokens(sample, settings.probe_tokens) for sample in few]
        probe = NoiseProbe(
            self._blocks.prunable,
            len(self._blocks),
            settings.noise_magnitude,
            settings.noise_seed,
            settings.sink_tokens,
            settings.noise_dtype,
        )
        most = max(count, settings.noise_samples_limit)
        profile = until_known(
            lambda chunk: self._sweep(chunk, probe, "Noise probe"),
            probe,
            samples[:most],
            count,
        )
        profile.warn_if_drowned(settings.noise_magnitude)
        return profile

    def direction(
        self,
        allocation: np.ndarray,
        base: Base,
        absorption: AbsorptionProfile | None,
        statistics: Mapping[str, torch.Tensor],
    ) -> np.ndarray:
        """Δ of the signal chosen, in the network under `allocation`."""
        settings = self._settings
        allocation = distributed.from_first(allocation)
        if self.signal == "noise":
            assert absorption is not None
            return direction_from_ratio(absorption.ratio)
        chosen = self._next_samples(settings.signal_samples)
        step = settings.response_step
        if self.signal == "gradient":
            slope = GradientProbe(
                self._blocks, statistics, allocation, step / 2, base.offsets
            )
            self._sweep(chosen, slope, "Loss slope")
            return direction_from_response(slope.slope())
        response = ResponseProbe(
            self._blocks, statistics, allocation, step, base.offsets
        )
        self._sweep(chosen, response, "Response probe")
        # per weight: the budget is one of weights, and blocks may differ in size
        size = self._blocks.parameters / self._blocks.parameters.mean()
        return direction_from_response(response.response().response / size)

    def _next_samples(self, count: int) -> list[dict]:
        """Other samples in every round, as far as there are any."""
        count = min(count, len(self._samples))
        start, self._measured = self._measured, self._measured + count
        order = interleaved(self._samples)
        chosen = [order[(start + i) % len(order)] for i in range(count)]
        return [cut_tokens(x, self._settings.probe_tokens) for x in chosen]

    def score(
        self,
        candidates: Sequence[np.ndarray],
        base: Base,
        statistics: Mapping[str, torch.Tensor],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Held-out loss sums (candidates, samples) and tokens (samples,)."""
        candidates = distributed.from_first(candidates)
        scores = CandidateScores(self._blocks, statistics, candidates, base.offsets)
        self._sweep(self._held_out, scores, "Held-out loss")
        return scores.losses()

    def rehearsal(
        self,
        base: Base,
        statistics: Mapping[str, torch.Tensor],
        compensation: Compensation | None,
    ) -> Score | None:
        """
        Scores as `score` does, but prunes as SparseGPT does, by a few calibration
        samples; None where that is not wanted.
        """
        settings = self._settings
        if compensation is None or settings.rehearsal_samples == 0:
            return None
        chosen = spread(self._samples, settings.rehearsal_samples)
        samples = [cut_tokens(x, settings.probe_tokens) for x in chosen]

        def rehearse(
            candidates: Sequence[np.ndarray],
        ) -> tuple[np.ndarray, np.ndarray]:
            passenger = Rehearsal(
                self._blocks,
                statistics,
                distributed.from_first(candidates),
                compensation,
                len(samples),
                base.offsets,
            )
            self._sweep([*samples, *self._held_out], passenger, "Rehearsal")
            return passenger.losses()

        return rehearse

    def _sweep(self, samples: list[dict], passenger: Passenger, what: str) -> None:
        """Every rank its share; all of them where a passenger takes but one batch."""
        tokens = sum(sample["input_ids"].numel() for sample in samples)
        logger.info(f"{what}: {len(samples)} samples, {tokens} tokens")
        memory, whole = self._settings.sweep_memory, passenger.undivided
        mine = samples if whole else distributed.share(samples)

        def run() -> None:
            sweep(
                self._model,
                self._blocks.modules,
                [block.name for block in self._blocks.blocks],
                [padded(mine)] if whole else join_samples(mine),
                [passenger],
                memory=memory,
                description=what,
            )

        with distributed.fail_together():
            if self.cache is None:
                run()
            else:
                self.cache.ride(what, mine, passenger, memory, run)


def _check_alike(samples: list[dict]) -> None:
    mine = [content(sample) for sample in samples]
    if any(other != mine for other in distributed.gather(mine)):
        raise ValueError(
            "the ranks of torch.distributed were given different calibration samples: "
            "pass what absorb_plugin.calibration.cache_batches(loader) returns, which "
            "collects those of all ranks"
        )


def allocate_model(
    model: PreTrainedModel,
    samples: Dataset,
    sparsity: float,
    settings: "AbsorptionAllocationModifier",
) -> Allocation:
    """
    Allocate without pruning, over all Linears of the decoder blocks.

    :param samples: rows of `input_ids` and `attention_mask`
    :param sparsity: the budget S
    """
    check_budget(sparsity, settings.max_sparsity)
    compute_on_one_device(model)
    linearize_moe(model)  # as oneshot does: the experts' weights become Linears
    blocks = find_blocks(model)
    return settings.allocate(model, blocks, samples_of(samples), sparsity)


def as_dict(allocation: Allocation, allocator: str) -> dict[str, Any]:
    """What `absorb allocate --json` prints."""
    base, targets = allocation.base, allocation.linear_sparsities()
    sparsities = allocation.block_sparsities()
    blocks = []
    for row, index in enumerate(allocation.blocks.prunable):
        block = allocation.blocks.blocks[index]
        entry: dict[str, Any] = {
            "name": block.name,
            "parameters": block.parameters,
            "metric": float(base.metric[row]),
            "base": float(base.sparsity[row]),
            "sparsity": sparsities[row],
        }
        names = {name: block.full_name(name) for name in block.linears}
        if any(full in base.linear_metrics for full in names.values()):
            unique = _unique_ends(list(names))
            entry["linears"] = {
                name.rpartition(".")[2] if unique else name: {
                    "metric": float(base.linear_metrics[full]),
                    "sparsity": targets[full],
                }
                for name, full in names.items()
            }
        blocks.append(entry)
    return {
        "allocator": allocator,
        "sparsity": allocation.budget,
        "achieved": allocation.achieved(),
        "blocks": blocks,
    }


def _unique_ends(names: list[str]) -> bool:
    """Whether the last parts of the names tell them apart, as in most models."""
    return len({name.rpartition(".")[2] for name in names}) == len(names)


def render(allocation: Allocation, file: TextIO) -> None:
    """Print the allocation as a table for people."""
    table = Table()
    for column in ("block", "weights", "metric", "base", "sparsity"):
        table.add_column(column, justify="left" if column == "block" else "right")
    sparsities = allocation.block_sparsities()
    for row, index in enumerate(allocation.blocks.prunable):
        block = allocation.blocks.blocks[index]
        table.add_row(
            block.name,
            f"{block.parameters:,}",
            f"{allocation.base.metric[row]:.4g}",
            f"{allocation.base.sparsity[row]:.4f}",
            f"{sparsities[row]:.4f}",
        )
    table.caption = f"{allocation.achieved():.4f} of {allocation.budget} over all"
    Console(file=file).print(table)
