"""The recipe's modifier: its lifecycle; the fields are in settings.py."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import absorb_plugin._llmcompressor  # noqa: F401  isort: skip  first
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier, ModifierFactory
from pydantic import PrivateAttr

from absorb_plugin import distributed
from absorb_plugin.files import check_writable
from absorb_plugin.plugins import notify_plugins
from absorb_plugin.settings import AllocationSettings

# The first import of llm-compressor, wherever it happens, imports this module (see
# absorb_plugin/__init__.py). Whatever imports llm-compressor may be half imported then,
# so the methods fetch it when they run.
if TYPE_CHECKING:
    from absorb_plugin.blocks import BlockMap
    from absorb_plugin.pruners.adapter import PrunerAdapter
    from absorb_plugin.pruners.zeros import PrunedZeros
    from absorb_plugin.report import Report

__all__ = ["AbsorptionAllocationModifier"]

# llm-compressor 0.13 renamed the event
CALIBRATION_START = ("calibration_start", "calibration_epoch_start")


class AbsorptionAllocationModifier(Modifier, AllocationSettings):
    """
    Chooses the sparsity of every Linear for the pruning modifiers after it in the
    recipe, from the paper: https://arxiv.org/abs/2606.15161

    Base ratios come from an allocator (OWL, AlphaPruning, …); a signal that tells how
    the rest of the network takes a change of each Linear corrects them; the budget, the
    scalar `sparsity` of each pruning modifier, is kept.

    Sample yaml:

    ```yaml
    test_stage:
      pruning_modifiers:
        AbsorptionAllocationModifier:
          allocator: owl
          report_dir: report
        WandaPruningModifier:
          sparsity: 0.6
          targets: ["Linear"]
          ignore: ["re:.*lm_head"]
    ```

    Lifecycle:

    - on_initialize
        - find_blocks, find_pruners: everything that can be refused is refused here
    - on_event (calibration start, before any hook of the pruning modifiers)
        - calibration batches -> statistics -> base allocation -> signal -> correction
          -> budget -> confirmation -> pruners
    - on_finalize
        - measure the realised sparsity, write the report

    :param allocator: name of the base allocator; `absorb allocators` lists them
    :param allocator_args: its arguments
    :param granularity: what the base allocator ranks: "block", or "linear" where it can
    :param level: what is corrected alike: a "block", its attention and its MLP
        ("part"), or a "linear"; "auto" is "linear"
    :param signal: what the correction follows. "gradient": the slope of calibration
        loss in each Linear's sparsity, in the network as it is masked. "pruner": the
        same through the pruner's own arithmetic. "response": by relaxing one group at a
        time, the dearer the more there are. "noise": the paper's ratio, how the dense
        network absorbs or amplifies noise after each block. "auto": "gradient" before
        Wanda, "pruner" before SparseGPT, "response" at level "block" before Wanda up to
        6 blocks
    :param signal_args: the signal's arguments (docs/recipe.md)
    :param strength: "auto" descends along the slopes and never returns what does worse
        than the base allocation or than uniform on calibration samples held out from
        everything else. A number takes one step of at most that change of a sparsity;
        0 keeps the base allocation and measures nothing
    :param max_loss_increase: instead of a sparsity, the aim: the pruner's `sparsity` is
        the largest budget then, and the one taken is the largest whose loss on held-out
        samples, plus one standard error, grows by no more than this over the dense
        model, in nats per token; with the quantisation that follows in the recipe, if
        one does (docs/quality-target.md)
    :param effort: how much is measured: "quick", "standard" or "thorough"; what it
        costs and brings is in docs/benchmarks.md. The next seven override parts of it
    :param rounds: steps of the descent, each measured where the one before ended;
        before SparseGPT half as many by the pruner's slopes follow. The noise signal
        has one
    :param descents: from one start, each by samples of its own; their mean is taken
    :param statistics_samples: calibration samples for the inputs' statistics
    :param signal_samples: windows of `probe_tokens`, each of another sample, of every
        round's signal; of shorter samples so many more, here and below
    :param search_samples: held-out windows that judge the rounds
    :param confirm_samples: held-out windows of the last comparison, by the pruner's own
        arithmetic: what the search found must not do worse in it than the base
        allocation or uniform. 0 for none
    :param probe_tokens: at most so many tokens of a sample make a window
    :param max_sparsity: no Linear is pruned beyond it
    :param limits: pattern -> [low, high]: bounds of the sparsity of the Linears that it
        matches, by full name or "re:…"; the others meet the budget
    :param probe_memory: bytes that a probe may take beside the model; batches are split
        to stay below, down to one sample. "auto" takes half of what is free where the
        model computes (docs/scaling.md)
    :param report_dir: where to write profile.json, profile.png and report.html; None
        for no report
    :param profile_cache: directory where measurements are kept as they complete, for a
        run that repeats this one after an interruption, or at another sparsity; None
        to keep nothing
    :param ignore: modules to leave dense and out of the budget, beside those that the
        pruning modifiers ignore
    :param reduce_pruner_statistics: under torch.distributed, have the pruning modifiers
        prune by the calibration samples of all ranks; llm-compressor has each rank
        prune by its own. Without effect on one rank
    """

    requires_calibration_data: bool = False  # True would cost a calibration of its own

    _blocks: "BlockMap" = PrivateAttr()
    _pruners: "list[PrunerAdapter]" = PrivateAttr(default_factory=list)
    _zeros: "list[PrunedZeros]" = PrivateAttr(default_factory=list)
    _reports: "list[Report]" = PrivateAttr(default_factory=list)
    _recipe: str = PrivateAttr(default="")
    _quantizing: tuple[str, ...] = PrivateAttr(default=())
    _first_report: int = PrivateAttr(default=0)
    _run: str = PrivateAttr(default="")
    _start: Path = PrivateAttr(default=Path())
    _staging: str | None = PrivateAttr(default=None)
    _lent: str | None = PrivateAttr(default=None)
    _undo: Callable[[], bool] | None = PrivateAttr(default=None)

    def stage_reports(self, directory: str) -> None:
        """Reports are written there, from where they go to `report_dir` afterwards."""
        self._staging = directory

    def lend_cache(self, directory: str) -> None:
        """As `profile_cache`, for what is gone after the run: no report quotes it."""
        self._lent = directory

    def profiles(self) -> list[dict[str, Any]]:
        """After a run: what profile.json has, per pruning modifier."""
        return [report.profile() for report in self._reports]

    def cache_directory(self) -> str | None:
        return self._from_start(self._lent or self.profile_cache)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        from absorb_plugin.blocks import find_blocks
        from absorb_plugin.calibration import is_empty, read_batches
        from absorb_plugin.choices import (
            budget_of,
            choose_signal,
            needs_loss,
            warn_of_other_weights,
        )
        from absorb_plugin.language_model import check_predicts_tokens
        from absorb_plugin.limits import check_matched
        from absorb_plugin.pruners import adapter, ranks
        from absorb_plugin.pruners.experts import warn_of_packing
        from absorb_plugin.pruners.recipe import recipe_text
        from absorb_plugin.pruners.traced import keep_causal_masks
        from absorb_plugin.pruners.zeros import PrunedZeros
        from absorb_plugin.report.folder import check_replaceable

        self.base_allocator()
        self._start = Path.cwd()
        self._blocks = find_blocks(state.model, kwargs.get("sequential_targets"))
        self._recipe = recipe_text()  # before anything in it is changed
        warn_of_other_weights(self._blocks)
        self._pruners = adapter.find_pruners(
            self, state.model, self._blocks, self.ignore, self.highest_sparsity()
        )
        self._count_reports_before()
        check_matched(self.limits, [found.blocks for found in self._pruners])
        if self.max_loss_increase is not None:
            self._quantizing = adapter.check_aim(self._pruners)
        for found in self._pruners:
            if needs_loss(self, choose_signal(self, found.blocks, found.pruner)):
                check_predicts_tokens(state.model)
            budget_of(found.blocks, found.sparsity, self, found.pruner)
        calib = state.data.calib
        missing = calib is None or is_empty(calib)
        if all(distributed.gather(missing)):  # one rank may be without samples
            read_batches(calib)  # says what is missing
        written = {
            "report_dir": self._report_dir,
            "profile_cache": self.cache_directory(),
        }
        with distributed.fail_together():  # a directory may be missing on one node
            for field, directory in written.items():
                if directory is not None:
                    check_writable(field, directory)
            if self._report_dir is not None:
                count = len(self._pruners)
                numbers = range(self._first_report, self._first_report + count)
                check_replaceable(self._report_dir, numbers)
        warn_of_packing(state.model)
        for found in self._pruners if self.reduce_pruner_statistics else ():
            if (attribute := found.pruner.rank_statistics) is not None:
                ranks.reduce_statistics(found.modifier, attribute)
        self._zeros = [PrunedZeros(found) for found in self._pruners]
        for zeros in self._zeros:
            zeros.watch()
        # last: after an error from here llm-compressor never calls on_finalize
        self._undo = keep_causal_masks(state.model, self._blocks.modules)
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_.value not in CALIBRATION_START or self._reports:
            return
        try:
            self._allocate(state)
        except BaseException:  # after which llm-compressor never calls on_finalize
            self._take_masks_away()
            raise

    def _allocate(self, state: State) -> None:
        from absorb_plugin.allocate import allocate
        from absorb_plugin.calibration import read_batches
        from absorb_plugin.choices import warn_of_padding
        from absorb_plugin.devices import computing_on_one_device
        from absorb_plugin.language_model import language_model
        from absorb_plugin.pruners import adapter
        from absorb_plugin.report import Report
        from absorb_plugin.report.folder import remove_others

        batches = read_batches(state.data.calib)
        warn_of_padding(self, batches)
        for number, found in enumerate(self._pruners, self._first_report):
            with computing_on_one_device(state.model):
                allocation = allocate(
                    state.model,
                    found.blocks,
                    batches,
                    sparsity=found.sparsity,
                    pruner=found.pruner,
                    settings=self,
                    quantized=adapter.quantized_afterwards(
                        self._quantizing, state.model, found.blocks
                    ),
                )
            found.set_sparsities(allocation.linear_sparsities())
            report = Report(
                self,
                self._recipe,
                language_model(state.model),
                found,
                allocation,
                batches,
                self._run,
                number,
            )
            self._reports.append(report)
            if distributed.is_first():
                if number == 0 and self._report_dir is not None:
                    remove_others(self._report_dir)
                report.write(self._report_dir)
                notify_plugins(report.profile())

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        from absorb_plugin.pruners.experts import name_as_stored
        from absorb_plugin.pruners.recipe import (
            broken_off,
            leave_recipe,
            say_whether_it_replays,
        )
        from absorb_plugin.pruners.wrapped import unwrap
        from absorb_plugin.pruners.zeros import at_the_end

        mask_kept = self._take_masks_away()
        for found in self._pruners:
            unwrap(found.modifier, "compress_modules")
        # not if the run has failed, and the next one clears up after it
        if all(found.modifier.ended_ for found in self._pruners) and not broken_off():
            at_the_end(self, self._measure_realised)
            leave_recipe(self, state.model)
            name_as_stored(state.model)
            say_whether_it_replays(state.model, mask_kept)
        return True

    def _take_masks_away(self) -> bool:
        """Whether there were any that the pipelines had of us."""
        undo, self._undo = self._undo, None
        return undo is not None and undo()

    def _count_reports_before(self) -> None:
        """Of earlier modifiers of this class in the recipe, in the same directory."""
        from absorb_plugin.pruners.recipe import modifiers_before

        kind = AbsorptionAllocationModifier
        earlier = [x for x in modifiers_before(self) if isinstance(x, kind)]
        beside = [x for x in earlier if x._report_folder() == self._report_folder()]
        self._first_report = sum(len(other._pruners) for other in beside)
        self._run = earlier[0]._run if earlier else uuid.uuid4().hex

    def _report_folder(self) -> Path | None:
        """One way to write it, of `report`, `./report` and a link to it."""
        directory = self._from_start(self.report_dir)
        return None if directory is None else Path(directory).resolve()

    def _measure_realised(self) -> None:
        if not distributed.is_first():
            return
        for zeros in self._zeros:
            zeros.warn()
        for report, zeros in zip(self._reports, self._zeros):
            report.measure_realised(zeros.lost())
            report.write(self._report_dir)

    @property
    def _report_dir(self) -> str | None:
        return self._from_start(self._staging or self.report_dir)

    def _from_start(self, directory: str | None) -> str | None:
        """Scripts may go elsewhere while it runs."""
        return directory and str(self._start / directory)


ModifierFactory.register(
    AbsorptionAllocationModifier.__name__, AbsorptionAllocationModifier
)
