"""The steps of the method, and what is measured once for all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from loguru import logger
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.allocators.base_allocation import Base, Numbers, base_allocation
from absorb_plugin.allocators.grams import GramProbe
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch
from absorb_plugin.choices import (
    check_judges,
    choose_level,
    choose_signal,
    needs_loss,
    unseen,
    warn_of_few_tokens,
    warn_of_granularity,
    widest,
)
from absorb_plugin.forward.check import check_forward
from absorb_plugin.forward.inputs import InputStatistics
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.groups import Groups
from absorb_plugin.measuring import (
    dense_loss,
    masked_loss,
    measure_direction,
    pruned_loss,
    same_stages,
)
from absorb_plugin.pruners import Pruner
from absorb_plugin.pruners.present import ModelZeros
from absorb_plugin.pruners.quantization import QuantizedLinears
from absorb_plugin.sample_split import SampleSplit, SampleUse
from absorb_plugin.search.budget import Budget
from absorb_plugin.search.confirm import Confirmed, confirm
from absorb_plugin.search.correction import corrected
from absorb_plugin.search.descent import Stage, refined
from absorb_plugin.search.line_search import (
    SearchResult,
    Start,
    descent_search,
    gain,
    line_search,
)
from absorb_plugin.search.quality import Quality, QuantizationCost, largest_budget
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.signals import Context
from absorb_plugin.torch_state import check_differentiable

__all__ = ["Method"]


class Method:
    """
    What is measured once, and serves every budget.

    :param model: as of `allocate.allocate`, and so are the others
    """

    def __init__(
        self,
        model: Module,
        blocks: BlockMap,
        batches: Sequence[Batch],
        *,
        pruner: Pruner,
        settings: AllocationSettings,
        quantized: QuantizedLinears | None = None,
    ) -> None:
        self.settings = settings
        self._quantized = quantized
        self.signal = choose_signal(settings, blocks, pruner)
        self._effort = settings.measuring()
        judged = settings.strength == "auto"
        by_loss = needs_loss(settings, self.signal)
        self._confirms = judged and self._effort.confirm > 0
        prunes = self._confirms or (by_loss and self.signal.prunes)
        samples = SampleSplit(
            batches,
            self._effort,
            judged=judged,
            by_loss=by_loss,
            pruning_tokens=pruner.judge_tokens(widest(blocks)) if prunes else None,
        )
        check_judges(settings, samples)
        warn_of_few_tokens(pruner, blocks, batches)
        warn_of_granularity(settings)
        runner = ProbeRunner(
            model, blocks, settings.probe_memory, settings.cache_directory()
        )
        if settings.strength != 0:
            if self.signal.differentiates:
                check_differentiable(model)
            with distributed.fail_together():
                shortest = samples.shortest()
                check_forward(
                    model,
                    blocks,
                    shortest,
                    by_loss=by_loss,
                    by_slope=self.signal.differentiates,
                    by_part=prunes,
                )
        self._allocator, self._numbers = settings.base_allocator(), Numbers()
        statistics: Mapping[str, torch.Tensor] = {}
        if by_loss or self._allocator.needs == "activations":
            what, probe = "Input statistics", InputStatistics(blocks)
            # it has been checked only then that blocks can run in parts
            statistics = runner.run(what, samples.statistics, probe, in_parts=prunes)
        self._measured: Mapping[str, float] = {}
        self._observes = bool(statistics) or self._allocator.needs == "gram"
        if self._allocator.needs == "gram":
            grams = GramProbe(blocks, self._allocator)
            self._measured = runner.run("Second moments", samples.statistics, grams)
        self.unseen = unseen(blocks, statistics) if statistics else None
        groups = Groups.at(choose_level(settings), blocks)
        self.context = Context(blocks, groups, samples, runner, pruner, statistics)

    def uses(self, compared: bool) -> list[SampleUse]:
        """
        What samples served, without those set apart that nothing was asked of.

        :param compared: whether the pruner's own arithmetic judged allocations
        """
        idle = set() if self._observes else {"statistics"}
        if not compared:
            idle |= {"confirm"} if self.signal.prunes else {"confirm", "pruning"}
        return [one for one in self.context.samples.uses() if one.use not in idle]

    def zeros(self, present: ModelZeros) -> ModelZeros:
        """
        With the weights of features that no token used, where the pruner zeroes them.

        :param present: zeros of the model's own weights
        """
        context = self.context
        if not (context.pruner.zeroes_unused and context.statistics):
            return present
        return ModelZeros.of(context.blocks, context.pruner, context.statistics)

    def base(self, budget: Budget) -> Base:
        """What the base allocator makes of a budget."""
        return base_allocation(
            self._allocator,
            self.context.blocks,
            self.context.statistics,
            budget,
            measured=self._measured,
            granularity=self.settings.granularity,
            cache=self.context.runner.cache or self._numbers,
        )

    def step(
        self, start: np.ndarray, budget: Budget, strength: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """One step of exactly that size, as in the paper, and its direction."""
        direction = measure_direction(self.context, self.signal, start)
        return budget.meet(corrected(start, direction, strength)), direction

    def undecided(self, final: np.ndarray, base: Base, budget: Budget) -> bool:
        """Whether the pruner's own arithmetic has several to choose from."""
        alone = np.array_equal(base.sparsity, budget.uniform())
        return self._confirms and not (final is base.sparsity and alone)

    def confirmed(
        self,
        final: np.ndarray,
        base: Base,
        budget: Budget,
        search: SearchResult | None,
    ) -> tuple[SearchResult | None, Confirmed]:
        """
        By the pruner's own arithmetic. Masks choose where the search starts; if that is
        clearly not what the pruner does better with, it is run again from there.

        :param search: that found `final`; None where a bound on the loss did, and
            base and uniform have been asked
        """
        settled = search is None
        judge = partial(pruned_loss, self.context, quantized=self._quantized)
        first = confirm(final, base.sparsity, budget, judge, settled)
        agreed = search is None or first.start in (None, search.start)
        if agreed or self.signal.once:
            return search, first
        again = self.search(base, budget, first.start)
        second = confirm(again.sparsity, base.sparsity, budget, judge)
        won = (again, second) if second.loss < first.loss else (search, first)
        return won[0], replace(won[1], anew=True)

    def search(
        self, base: Base, budget: Budget, start: Start | None = None
    ) -> SearchResult:
        """
        Down the slopes of a signal that has some, else along its direction.

        :param start: of the former, "base" or "uniform"; None for the better one under
            masks
        """
        context, signal = self.context, self.signal
        judge = partial(masked_loss, context)
        if signal.once:
            measure = partial(measure_direction, context, signal)
            return line_search(base.sparsity, budget, measure, judge)
        return descent_search(
            base.sparsity,
            budget,
            self._stages(),
            judge,
            groups=context.groups,
            start=start,
            times=self._effort.descents,
        )

    def found(
        self, budget: Budget, near: np.ndarray | None, base: Base | None = None
    ) -> np.ndarray:
        """
        What the search finds.

        :param near: the allocation of another budget, from which a few short steps are
            enough; None if there is none
        :param base: of the budget, where it is known; else it is made if it is needed
        """
        if near is None:
            start = self.base(budget) if base is None else base
            return self.search(start, budget).sparsity
        last = self._stages()[-1]
        found = refined(budget.meet(near), budget, last, self.context.groups)
        return budget.whole(found)

    def _stages(self) -> list[Stage]:
        return same_stages(self.signal.stages(self.context, self._effort.rounds))

    def largest_budget(self, budget: Budget, bound: float) -> Quality:
        """
        :param budget: the largest
        :param bound: on the increase of the loss over the dense model, nats per token
        """
        dense, tokens = dense_loss(self.context)

        def at(sparsity: float, near: np.ndarray | None) -> np.ndarray:
            return self.found(budget.at(sparsity), near)

        known: dict[bytes, tuple[float, float]] = {}

        def increase(allocation: np.ndarray) -> tuple[float, float]:
            if (told := known.get(allocation.tobytes())) is not None:
                return told
            sums, _ = pruned_loss(self.context, [allocation], self._quantized)
            found, error = gain(sums[0], dense[0], tokens)
            costs = "costs" if self._quantized is None else "and quantising cost"
            logger.info(
                f"Sparsity {budget.achieved(allocation):.4f} {costs} {found:.4f} ± "
                f"{error:.4f} nats per token; max_loss_increase is {bound:g}"
            )
            return known.setdefault(allocation.tobytes(), (found, error))

        quantization = self._quantization_cost(budget, increase, bound)
        beside = 0.0 if quantization is None else quantization.increase

        def scan(sparsities: Sequence[float]) -> list[float]:
            uniform = [budget.at(sparsity).uniform() for sparsity in sparsities]
            nothing = np.zeros_like(uniform[0])
            sums, tokens = masked_loss(self.context, [nothing, *uniform])
            return [gain(one, sums[0], tokens)[0] + beside for one in sums[1:]]

        # in whole weights of a row, else they would bear less than is said
        rivals: dict[str, Callable[[float], np.ndarray]] = {
            "base": lambda s: budget.at(s).whole(self.base(budget.at(s)).sparsity),
            "uniform": lambda s: budget.at(s).whole(budget.at(s).uniform()),
        }
        upper, least = budget.sparsity, budget.least()
        return largest_budget(
            bound, upper, at, increase, scan, least, rivals, quantization
        )

    def _quantization_cost(
        self,
        budget: Budget,
        increase: Callable[[np.ndarray], tuple[float, float]],
        bound: float,
    ) -> QuantizationCost | None:
        """:raises ValueError: if it leaves nothing of the bound to pruning"""
        if self._quantized is None:
            return None
        nothing = np.zeros_like(budget.uniform())
        cost = QuantizationCost(self._quantized.modifiers, *increase(nothing))
        if not cost.increase + np.nan_to_num(cost.error) < bound:
            more = "leave the quantisation out"
            if better := self._quantized.better:
                more = (
                    f"give {better}, which may cost less than rounding to nearest, by "
                    "which it is judged, a `oneshot` of its own after this one"
                )
            raise ValueError(
                f"max_loss_increase={bound:g} cannot be kept: {cost}. Raise it above "
                f"that, quantise to more bits or in smaller groups, or {more}"
            )
        return cost
