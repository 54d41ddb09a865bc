"""The recipe's fields, checked; `AbsorptionAllocationModifier` is their lifecycle."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from absorb_plugin.allocators.base import Allocator
from absorb_plugin.limits import check_limits
from absorb_plugin.names import EffortName, Granularity, Level
from absorb_plugin.plugins import build_allocator

__all__ = ["EFFORTS", "LEAST_SAMPLES", "MAX_SPARSITY", "AllocationSettings", "Effort"]
__all__ += ["expanded"]


@dataclass(frozen=True)
class Effort:
    """
    How much is measured. Samples are calibration samples of the run.

    :param rounds: corrections at most
    :param descents: from one start, each of so many rounds by samples of its own; their
        mean is taken
    :param statistics: samples for the inputs' statistics, whole
    :param signal: samples of each round's signal
    :param search: held-out samples that judge the rounds
    :param confirm: samples of the last comparison, which chose nothing before
    :param tokens: of a sample, for the signal and for judging
    """

    rounds: int
    descents: int
    statistics: int
    signal: int
    search: int
    confirm: int
    tokens: int


# Windows are not shorter: more of their tokens would be predicted from little context,
# as few tokens of a text are.
EFFORTS = {
    "quick": Effort(6, 1, statistics=8, signal=4, search=4, confirm=4, tokens=256),
    "standard": Effort(12, 1, statistics=16, signal=8, search=8, confirm=8, tokens=256),
    "thorough": Effort(
        12, 3, statistics=32, signal=16, search=16, confirm=16, tokens=256
    ),
}

# No Linear is pruned beyond it, unless another is given.
MAX_SPARSITY = 0.95

# Of fewer calibration samples there are no two for the last comparison, and no standard
# error, with which a bound on the loss is held (`sample_split`).
LEAST_SAMPLES = 8

# Names of earlier versions, and what to write now.
RENAMED = {
    "sweep_memory": "probe_memory",
    "holdout_samples": "search_samples",
    "rehearsal_samples": "confirm_samples",
    "reduce_peer_statistics": "reduce_pruner_statistics",
    "noise_magnitude": "signal_args: {magnitude: ...}",
    "noise_dtype": "signal_args: {dtype: ...}",
    "noise_samples": "signal_args: {samples: ...}",
    "noise_samples_limit": "signal_args: {samples_limit: ...}",
    "noise_seed": "signal_args: {seed: ...}",
    "sink_tokens": "signal_args: {sink_tokens: ...}",
    "response_step": "signal_args: {step: ...}",
}


def _refuse_truth(value: Any) -> Any:
    """Else True would count as 1."""
    if isinstance(value, bool):
        raise ValueError(
            f"{value} is no number, and YAML reads yes, no, on and off so: write a "
            "number"
        )
    return value


NO_TRUTH = BeforeValidator(_refuse_truth)
Number = Annotated[float, NO_TRUTH]
Increase = Annotated[float, Field(gt=0, allow_inf_nan=False), NO_TRUTH]
Count = Annotated[int, Field(ge=1), NO_TRUTH]
Strength = Annotated[float, Field(ge=-1, le=1)] | Literal["auto"]
Memory = Annotated[int, Field(gt=0)] | Literal["auto"]


class AllocationSettings(BaseModel):
    """
    The fields of `AbsorptionAllocationModifier`, where they are described.
    """

    allocator: str = "owl"
    allocator_args: dict[str, Any] = Field(default_factory=dict)
    granularity: Granularity = "block"
    level: Level = "auto"
    signal: str = "auto"
    signal_args: dict[str, Any] = Field(default_factory=dict)
    strength: Annotated[Strength, NO_TRUTH] = "auto"
    max_loss_increase: Increase | None = None
    effort: EffortName = "standard"
    rounds: Count | None = None
    descents: Count | None = None
    statistics_samples: Count | None = None
    signal_samples: Count | None = None
    search_samples: Count | None = None
    confirm_samples: Annotated[int, Field(ge=0), NO_TRUTH] | None = None
    probe_tokens: Annotated[int, Field(ge=2), NO_TRUTH] | None = None
    max_sparsity: Number = Field(default=MAX_SPARSITY, gt=0, lt=1)
    limits: dict[str, tuple[Number, Number]] = Field(default_factory=dict)
    probe_memory: Annotated[Memory, NO_TRUTH] = "auto"
    report_dir: str | None = None
    profile_cache: str | None = None
    ignore: list[str] = Field(default_factory=list)
    reduce_pruner_statistics: bool = True

    @model_validator(mode="before")
    @classmethod
    def validate_names(cls, values: Any) -> Any:
        for name in (
            RENAMED.keys() & values.keys() if isinstance(values, Mapping) else ()
        ):
            raise ValueError(f"field {name!r} is called {RENAMED[name]} now")
        return values

    @field_validator("report_dir", "profile_cache", mode="before")
    @classmethod
    def validate_directory(cls, value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str | Path):
            raise ValueError(f"{value!r} is no path: write it in quotes if it is one")
        if not str(value).strip():
            raise ValueError(
                f"{value!r} is no path: name a directory, as ./report, or leave it out"
            )
        return expanded(value)

    @field_validator("limits", mode="after")
    @classmethod
    def validate_limits(
        cls, value: dict[str, tuple[float, float]]
    ) -> dict[str, tuple[float, float]]:
        check_limits(value)
        return value

    @field_validator("ignore", mode="before")
    @classmethod
    def validate_ignore(cls, value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def validate_quality(self) -> "AllocationSettings":
        if self.max_loss_increase is None:
            return self
        if self.strength != "auto" or self.measuring().confirm < 2:
            raise ValueError(
                "max_loss_increase is kept by judging allocations on held-out samples, "
                "with a margin of one standard error: leave strength at 'auto', and "
                "confirm_samples out or at 2 or more"
            )
        if self.signal == "noise":
            raise ValueError(
                "max_loss_increase needs a signal that can be measured anew at every "
                "budget: leave signal at 'auto'"
            )
        return self

    def highest_sparsity(self) -> float:
        """
        What is asked for may not be above. Where a loss is the aim it is but the most.
        """
        return self.max_sparsity if self.max_loss_increase is None else 1.0

    def cache_directory(self) -> str | None:
        """Where measurements are kept."""
        return self.profile_cache

    def measuring(self) -> Effort:
        """What `effort` stands for, with the fields that override it."""
        chosen = EFFORTS[self.effort]
        given = {
            "rounds": self.rounds,
            "descents": self.descents,
            "statistics": self.statistics_samples,
            "signal": self.signal_samples,
            "search": self.search_samples,
            "confirm": self.confirm_samples,
            "tokens": self.probe_tokens,
        }
        own = {key: value for key, value in given.items() if value is not None}
        return Effort(**{**vars(chosen), **own})

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


def expanded(path: str | Path) -> str:
    """
    As text, and `~` at its beginning as the home directory.

    :raises ValueError: if there is none of that user
    """
    if not str(path).startswith("~"):
        return str(path)
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(
            f"{str(path)!r}: there is no home directory of that user: write the whole "
            "path, or ./ in front of it"
        ) from error
