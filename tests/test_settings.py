"""The recipe's fields: what earlier versions called them, and a signal's arguments."""

from pathlib import Path
from typing import Any

import pytest
from helpers import runs, tiny
from pydantic import ValidationError

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.choices import warn_of_granularity
from absorb_plugin.settings import EFFORTS, AllocationSettings
from absorb_plugin.signals import SIGNALS

# The name and a value that was valid, and how the same is written now.
OLD: dict[str, tuple[Any, dict[str, Any]]] = {
    "sweep_memory": (2**20, {"probe_memory": 2**20}),
    "holdout_samples": (4, {"search_samples": 4}),
    "rehearsal_samples": (0, {"confirm_samples": 0}),
    "reduce_peer_statistics": (False, {"reduce_pruner_statistics": False}),
    "noise_magnitude": (0.1, {"signal_args": {"magnitude": 0.1}}),
    "noise_dtype": ("float32", {"signal_args": {"dtype": "float32"}}),
    "noise_samples": (2, {"signal_args": {"samples": 2}}),
    "noise_samples_limit": (9, {"signal_args": {"samples_limit": 9}}),
    "noise_seed": (1, {"signal_args": {"seed": 1}}),
    "sink_tokens": ("spare", {"signal_args": {"sink_tokens": "spare"}}),
    "response_step": (0.2, {"signal_args": {"step": 0.2}}),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_name_is_refused_with_the_new_one(name: str) -> None:
    value, new = OLD[name]
    ((field, written),) = new.items()
    with pytest.raises(ValidationError, match=f"'{name}' is called {field}") as caught:
        AbsorptionAllocationModifier(**{name: value})
    if field == "signal_args":
        assert f"signal_args: {{{next(iter(written))}: ...}}" in str(caught.value)
        signal = "response" if name == "response_step" else "noise"
        SIGNALS[signal].made_with(written)
    modifier = AbsorptionAllocationModifier(**new)
    assert getattr(modifier, field) == written


def test_an_old_name_in_a_recipe_is_refused_too(tmp_path: Path) -> None:
    recipe = """
test_stage:
  test_modifiers:
    AbsorptionAllocationModifier: {noise_seed: 1}
    WandaPruningModifier: {sparsity: 0.5, targets: ["Linear"]}
"""
    with pytest.raises(ValueError, match=r"'noise_seed' is called signal_args: \{seed"):
        runs.run(tiny.small(), recipe, tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "magnitude": (
        {"signal": "noise", "signal_args": {"magnitude": 0.0}},
        "'noise': magnitude=0.0: .*greater than 0.*magnitude=0.01",
    ),
    "infinity": (
        {"signal": "noise", "signal_args": {"magnitude": float("inf")}},
        "magnitude=inf: .*finite",
    ),
    "samples": (
        {"signal": "noise", "signal_args": {"samples": 0}},
        "samples=0: .*greater than or equal to 1",
    ),
    "seed": (
        {"signal": "noise", "signal_args": {"seed": "a"}},
        "seed='a': .*integer",
    ),
    "large seed": (
        {"signal": "noise", "signal_args": {"seed": 2**63}},
        f"seed={2**63}: .*less than",
    ),
    "sinks": (
        {"signal": "noise", "signal_args": {"sink_tokens": "some"}},
        "sink_tokens='some': .*'perturb', 'spare' or 'auto'",
    ),
    "dtype": (
        {"signal": "noise", "signal_args": {"dtype": "float64"}},
        "dtype='float64': .*'model' or 'float32'",
    ),
    "two at once": (
        {"signal": "noise", "signal_args": {"seed": -1, "samples": 0}},
        "samples=0.*seed=-1",
    ),
    "step": (
        {"signal": "response", "signal_args": {"step": 1.0}},
        "'response': step=1.0: .*less than 1. Defaults: step=",
    ),
    "of another signal": (
        {"signal": "gradient", "signal_args": {"magnitude": 0.1}},
        "'gradient': magnitude=0.1 is no argument of it. It takes step=0.05",
    ),
    "of what auto stands for": (
        {"signal": "auto", "signal_args": {"seed": 1}},
        "'gradient': seed=1 is no argument",
    ),
    "signal": (
        {"signal": "loud"},
        r"signal='loud': choose auto or one of \['gradient', 'pruner', 'response', "
        r"'noise'\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_of_a_signal_are_checked_before_the_model_runs(
    tmp_path: Path, case: str
) -> None:
    fields, message = REFUSED[case]
    model = tiny.small()
    with (
        tiny.counted({"model": model.model}) as passes,
        pytest.raises(ValueError, match=message),
    ):
        runs.run(model, [runs.absorption(**fields), runs.pruner()], tmp_path)
    assert passes == {"model": 0}


def test_arguments_reach_the_signal() -> None:
    found = runs.allocate(
        tiny.small(), signal="noise", signal_args={"magnitude": 0.2, "samples": 3}
    )
    assert found.noise is not None and found.noise.samples == 4
    assert (found.noise_settings.magnitude, found.noise_settings.samples) == (0.2, 3)
    directions = [
        runs.allocate(
            tiny.small(), signal="gradient", signal_args={"step": step}
        ).direction.tolist()
        for step in (0.05, 0.3)
    ]
    assert directions[0] != directions[1]


def test_effort_is_the_default_of_what_is_left_out() -> None:
    assert AllocationSettings().measuring() == EFFORTS["standard"]
    assert AllocationSettings(effort="quick").measuring() == EFFORTS["quick"]
    mine = AllocationSettings(
        effort="thorough",
        rounds=1,
        descents=5,
        statistics_samples=2,
        signal_samples=3,
        search_samples=4,
        confirm_samples=0,
        probe_tokens=6,
    ).measuring()
    assert list(vars(mine).values()) == [1, 5, 2, 3, 4, 0, 6]


@pytest.mark.parametrize("allocator", ["owl", "dlp", "alpha_pruning", "uniform"])
@pytest.mark.parametrize("granularity", ["block", "linear"])
def test_blockwise_allocators_by_linear_are_warned_of(
    allocator: str, granularity: str, warnings: list[str]
) -> None:
    settings = AllocationSettings(allocator=allocator, granularity=granularity)
    warn_of_granularity(settings)
    told = [line for line in warnings if "granularity: linear" in line]
    assert len(told) == (granularity == "linear" and allocator != "uniform")


@pytest.mark.parametrize("field", ["report_dir", "profile_cache"])
def test_a_directory_at_home(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, meant in {
        "~/runs/a": str(tmp_path / "runs" / "a"),
        Path("~"): str(tmp_path),
        "runs/~/a": "runs/~/a",
        "./~": "./~",
    }.items():
        assert getattr(AllocationSettings(**{field: given}), field) == meant
    with pytest.raises(ValidationError, match="'~no-such-user/a': there is no home"):
        AllocationSettings(**{field: "~no-such-user/a"})


@pytest.mark.parametrize("value", [5, 0.5, True, ["a"]])
def test_a_directory_is_no_number(value: object) -> None:
    for field in ("report_dir", "profile_cache"):
        with pytest.raises(ValidationError, match=f"{field}\n.* is no path: write it"):
            AllocationSettings(**{field: value})


@pytest.mark.parametrize("value", ["", "  "])
def test_a_directory_has_a_name(value: str) -> None:
    for field in ("report_dir", "profile_cache"):
        with pytest.raises(ValidationError, match=f"{field}\n.* is no path: name a"):
            AllocationSettings(**{field: value})


@pytest.mark.parametrize("fields", [{"strength": 0.1}, {"confirm_samples": 1}])
def test_a_bound_on_the_loss_is_judged_with_a_margin(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="confirm_samples out or at 2 or more"):
        AllocationSettings(max_loss_increase=0.1, **fields)


NUMBERS = [
    *("strength", "max_loss_increase", "rounds", "statistics_samples"),
    *("signal_samples", "search_samples", "confirm_samples", "probe_tokens"),
    *("max_sparsity", "probe_memory"),
]


@pytest.mark.parametrize("field", NUMBERS)
def test_yes_is_no_number(field: str) -> None:
    for value in (True, False):
        with pytest.raises(ValidationError, match=f"{field}\n.*{value} is no number"):
            AllocationSettings(**{field: value})


def test_yes_is_no_bound() -> None:
    told = r"limits.*down_proj.*\n.*True is no number"
    with pytest.raises(ValidationError, match=told):
        AllocationSettings(limits={"re:.*down_proj": [0, True]})
