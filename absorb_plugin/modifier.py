"""The recipe's modifier: fields and lifecycle; the mathematics is elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator
from transformers import PreTrainedModel

from absorb_plugin import distributed, peers
from absorb_plugin.allocation import Allocation, Calibration, base_allocation
from absorb_plugin.allocators.base import Allocator
from absorb_plugin.blocks import BlockMap, find_blocks
from absorb_plugin.budget import meet_budget
from absorb_plugin.calibration import cache_batches
from absorb_plugin.compensation import Compensation
from absorb_plugin.correction import corrected
from absorb_plugin.files import check_writable
from absorb_plugin.peer_statistics import leave_statistics, reduce_statistics
from absorb_plugin.plugins import announce, build_allocator
from absorb_plugin.report import Report
from absorb_plugin.strength import search_strength

__all__ = ["AbsorptionAllocationModifier"]

# llm-compressor 0.13 renamed the event
CALIBRATION_START = ("calibration_start", "calibration_epoch_start")


class AbsorptionAllocationModifier(Modifier):
    """
    Chooses the sparsity of every decoder block for the pruning modifiers behind it in
    the recipe, from the paper: https://arxiv.org/abs/2606.15161

    Base ratios come from an allocator (OWL, AlphaPruning, …); a signal that tells how
    the rest of the network takes a change of each block corrects them; the budget, the
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
        - find_blocks, find_peers: everything that can be refused is refused here
    - on_event (calibration start, before any hook of the pruning modifiers)
        - calibration batches -> statistics -> base allocation -> signal -> correction
          -> budget -> rehearsal -> peers
    - on_finalize
        - measure the realised sparsity, write the report

    :param allocator: name of the base allocator; `absorb allocators` lists them
    :param allocator_args: its arguments
    :param granularity: "block" for one sparsity per decoder block; "linear" lets the
        base allocator rank single Linears, where it can; the correction then shifts
        all Linears of a block alike
    :param signal: what the correction follows. "gradient": the slope of calibration
        loss in each block's sparsity, in the network as it is pruned. "response": the
        same by relaxing one block at a time, the dearer the more blocks there are.
        "noise": the paper's ratio, how the dense network absorbs or amplifies noise
        behind each block. "auto": "response" up to 6 blocks, "gradient" beyond
    :param rounds: at most so many corrections, each measured where the one before
        ended; the noise signal has one
    :param strength: largest change of a block's sparsity. "auto" tunes it on
        calibration samples held out from everything else, 0 and the negative side
        included, and never returns what scores worse there than the base allocation
        or than uniform. A number takes one round of just that strength; 0 keeps the
        base allocation and measures nothing
    :param noise_magnitude: η, length of the noise relative to the hidden state
    :param noise_dtype: what the noise probe computes in, "model" or "float32"; in 16
        bits a small η drowns in rounding, whose floor is measured and reported
    :param noise_samples: calibration samples the noise probe begins with; it takes as
        many again until every ratio is known to 5 %. Where noise is not the signal it
        serves the report only and runs on one
    :param noise_samples_limit: it stops there
    :param noise_seed: seed of the noise
    :param sink_tokens: "perturb" puts noise on all tokens, "spare" leaves out the first
        of every sample, "auto" those whose norm is beyond 20 times the median
    :param statistics_samples: calibration samples for the inputs' statistics
    :param signal_samples: calibration samples for "gradient" and "response"
    :param holdout_samples: calibration samples held out to judge strengths
    :param rehearsal_samples: calibration samples by which SparseGPT is rehearsed with
        strength "auto", if SparseGPTModifier follows: what the search found must not do
        worse in it than the base allocation. 0 for no rehearsal
    :param probe_tokens: so many tokens of a sample are used by "gradient" and
        "response", to judge strengths, to rehearse, and by a noise probe for the report
    :param response_step: δ, by how much "response" relaxes a block; "gradient" looks at
        weights within ± δ/2 of the threshold
    :param max_sparsity: no block is pruned beyond it
    :param sweep_memory: bytes that a probe may take beside the model; batches are split
        to stay below, down to one sample (docs/scaling.md)
    :param report_dir: where to write profile.json, profile.png and report.html; None
        for no report
    :param profile_cache: directory where measurements are kept as they complete, for a
        run that repeats this one after an interruption, or at another sparsity; None
        to keep nothing
    :param ignore: modules to leave dense and out of the budget, beside those that the
        pruning modifiers ignore
    :param reduce_peer_statistics: under torch.distributed, have the pruning modifiers
        prune by the calibration samples of all ranks; llm-compressor has each rank
        prune by its own. Without effect on one rank
    """

    requires_calibration_data: bool = False  # True would cost a calibration of its own

    allocator: str = "owl"
    allocator_args: dict[str, Any] = Field(default_factory=dict)
    granularity: Literal["block", "linear"] = "block"
    signal: Literal["auto", "gradient", "response", "noise"] = "auto"
    rounds: int = Field(default=4, ge=1)
    strength: Annotated[float, Field(ge=-1, le=1)] | Literal["auto"] = "auto"
    noise_magnitude: float = Field(default=1e-2, gt=0, allow_inf_nan=False)
    noise_dtype: Literal["model", "float32"] = "model"
    noise_samples: int = Field(default=8, ge=1)
    noise_samples_limit: int = Field(default=64, ge=1)
    noise_seed: int = Field(default=0, ge=0, lt=2**63)
    sink_tokens: Literal["perturb", "spare", "auto"] = "auto"
    statistics_samples: int = Field(default=16, ge=1)
    signal_samples: int = Field(default=8, ge=1)
    holdout_samples: int = Field(default=8, ge=1)
    rehearsal_samples: int = Field(default=8, ge=0)
    probe_tokens: int = Field(default=128, ge=2)
    response_step: float = Field(default=0.1, gt=0, lt=1)
    max_sparsity: float = Field(default=0.95, gt=0, lt=1)
    sweep_memory: int = Field(default=4 * 2**30, gt=0)
    report_dir: str | None = None
    profile_cache: str | None = None
    ignore: list[str] = Field(default_factory=list)
    reduce_peer_statistics: bool = True

    _blocks: BlockMap = PrivateAttr()
    _peers: list[peers.Peer] = PrivateAttr(default_factory=list)
    _reports: list[Report] = PrivateAttr(default_factory=list)
    _recipe: str = PrivateAttr(default="")

    def base_allocator(self) -> Allocator:
        """
        :raises ValueError: naming an allocator, argument or granularity there is not
        """
        allocator = build_allocator(self.allocator, self.allocator_args)
        if self.granularity not in allocator.granularities:
            raise ValueError(
                f"allocator {self.allocator!r} has no granularity {self.granularity!r}:"
                f" choose one of {list(allocator.granularities)}"
            )
        return allocator

    @property
    def recipe(self) -> str:
        """The recipe of the run as the user wrote it, for the report."""
        return self._recipe

    @field_validator("report_dir", "profile_cache", mode="before")
    def validate_directory(cls, value: str | Path | None) -> str | None:
        return None if value is None else str(value)

    @field_validator("ignore", mode="before")
    def validate_ignore(cls, value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self.base_allocator()
        self._blocks = find_blocks(state.model, kwargs.get("sequential_targets"))
        self._recipe = peers.recipe_text()  # before anything in it is changed
        self._peers = peers.find_peers(
            self, state.model, self._blocks, self.ignore, self.max_sparsity
        )
        if state.data.calib is None:
            cache_batches(None)  # says what is missing
        for field in ("report_dir", "profile_cache"):
            if (directory := getattr(self, field)) is not None:
                check_writable(field, directory)
        if self.reduce_peer_statistics:
            for peer in self._peers:
                reduce_statistics(peer.modifier)
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_.value not in CALIBRATION_START or self._reports:
            return
        batches = cache_batches(state.data.calib)
        for number, peer in enumerate(self._peers):
            allocation = self.allocate(
                state.model, peer.blocks, batches, peer.sparsity, peer.compensation
            )
            peer.hand_over(distributed.from_first(allocation.linear_sparsities()))
            report = Report(self, state.model, peer, allocation, batches, number)
            self._reports.append(report)
            if distributed.is_first():
                report.write(self.report_dir)
                announce(report.profile())

    def allocate(
        self,
        model: PreTrainedModel,
        blocks: BlockMap,
        batches: list[dict],
        sparsity: float,
        compensation: Compensation | None = None,
    ) -> Allocation:
        """
        The whole method: calibration batches -> statistics -> base allocation ->
        signal -> correction -> budget -> rehearsal.

        :param model: the dense model; its weights are not touched
        :param blocks: its blocks, with the Linears that will be pruned
        :param batches: tokenised calibration batches, the same on all ranks
        :param sparsity: the budget S
        :param compensation: how SparseGPT will prune, if it is SparseGPT that will
        """
        calibration = Calibration(model, blocks, batches, self)
        allocator = self.base_allocator()
        statistics = calibration.statistics(allocator.needs == "activations")
        base = base_allocation(
            allocator,
            blocks,
            statistics,
            sparsity,
            self.granularity,
            self.max_sparsity,
            calibration.cache,
        )
        absorption = calibration.absorption()

        def measure(allocation: np.ndarray) -> np.ndarray:
            return calibration.direction(allocation, base, absorption, statistics)

        def score(candidates: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            return calibration.score(candidates, base, statistics)

        sizes, search = blocks.parameters, None
        if self.strength == 0:
            direction, final = np.zeros_like(base.sparsity), base.sparsity
        elif self.strength == "auto":
            rounds = 1 if self.signal == "noise" else self.rounds
            search = search_strength(
                base.sparsity,
                sizes,
                sparsity,
                self.max_sparsity,
                measure,
                score,
                rounds,
                calibration.rehearsal(base, statistics, compensation),
            )
            direction, final = search.rounds[0].direction, search.sparsity
        else:
            direction = measure(base.sparsity)
            final = corrected(base.sparsity, direction, self.strength)
            final = meet_budget(final, sizes, sparsity, self.max_sparsity)
        return Allocation(
            blocks,
            sparsity,
            base,
            absorption,
            self.max_sparsity,
            final,
            direction,
            search,
            calibration.unseen,
        )

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        for report in self._reports if distributed.is_first() else ():
            report.measure_realised()
            report.write(self.report_dir)
        for peer in self._peers:
            leave_statistics(peer.modifier)
        peers.forget(self)
        logger.info("Allocation handed over; recipe.yaml replays without absorb_plugin")
        return True
