import json
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import absorb, error_of
from helpers.profiles import make_confirmed, make_profile
from matplotlib.image import imread

from absorb_plugin.evaluation import compare
from absorb_plugin.evaluation.compare import Run, read_runs

TASKS = {
    "arc": {"acc": 0.5, "acc_norm": 0.45, "stderr": 0.05, "n": 100},
    "lambada": {"acc": 0.3, "acc_norm": None, "stderr": None, "n": 1},
}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """The dense model, known by its evaluation; two that were pruned, with reports."""
    dense = {"model": "org/dense", "sparsity": 0.0, "perplexity": 20.0, "tokens": 99}
    write(tmp_path / "dense.json", dense | TASKS)
    settings = {"allocator": "owl", "strength": 0, "max_sparsity": 0.9}
    write(tmp_path / "owl" / "profile.json", make_profile(settings=settings))
    write(tmp_path / "owl" / "eval.json", {"perplexity": 80.5, "tokens": 99})
    first, second = make_profile(blocks=2), make_profile(blocks=4, realised=0.7)
    write(tmp_path / "ours" / "report" / "profile.json", first)
    write(
        tmp_path / "ours" / "report" / "profile_2.json",
        second | {"pruner": "SparseGPTModifier", "budget": 0.8},
    )
    write(tmp_path / "ours" / "eval_text.json", {"perplexity": 61.6, "tokens": 99})
    write(tmp_path / "ours" / "eval_tasks.json", TASKS)
    return [tmp_path / "dense.json", tmp_path / "owl", tmp_path / "ours"]


def test_runs_are_read(runs: list[Path]) -> None:
    dense, owl, ours = read_runs(runs)
    assert dense == Run(
        "dense", "org/dense", None, None, None, 0.0, 20.0, 99, tasks=TASKS
    )
    assert (owl.name, owl.allocation, owl.sparsity) == ("owl", "owl", 0.499)
    assert (owl.perplexity, owl.tasks, owl.model) == (80.5, {}, "org/tiny-model")
    assert ours.allocation == "owl + absorption"
    assert ours.pruner == "WandaPruningModifier, SparseGPTModifier"
    assert ours.tasks == TASKS and ours.perplexity == 61.6
    # two reports: shares are weighted by the weights they are of
    sizes = [sum(b["parameters"] for b in make_profile(n)["blocks"]) for n in (2, 4)]
    whole = sum(sizes)
    assert ours.sparsity == pytest.approx((0.499 * sizes[0] + 0.7 * sizes[1]) / whole)
    assert ours.budget == pytest.approx((0.5 * sizes[0] + 0.8 * sizes[1]) / whole)


@pytest.mark.parametrize("other", ["b", None])
def test_reports_of_two_runs_are_not_one(tmp_path: Path, other: str | None) -> None:
    """As two at once leave them in one report_dir; earlier versions wrote no `run`."""
    write(tmp_path / "profile.json", make_profile(run="a"))
    write(tmp_path / "profile_2.json", make_profile(run="a"))
    assert read_runs([tmp_path])
    second = make_profile(run=other)
    if other is None:
        del second["run"]
    write(tmp_path / "profile_2.json", second)
    with pytest.raises(ValueError, match="profile.json and .*_2.json are of different"):
        read_runs([tmp_path])


def test_runs_are_called_by_what_was_taken(tmp_path: Path) -> None:
    taken = {"profile": "base", "profile_2": "uniform", "profile_3": "base"}
    for name, chosen in taken.items():
        profile = make_profile(confirmed=make_confirmed(chosen))
        write(tmp_path / f"{name}.json", profile)
    (run,) = read_runs([tmp_path])
    assert run.allocation == "owl, uniform"


def test_json_and_table(runs: list[Path]) -> None:
    result = absorb("compare", *runs, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["runs"]
    assert [run["name"] for run in found] == ["dense", "owl", "ours"]
    assert found[0]["tasks"] == TASKS
    assert found[2]["perplexity"] == 61.6

    result = absorb("compare", *runs)
    for text in ("dense", "owl", "0.4990", "80.50", "61.60", "0.500", "0.450"):
        assert text in result.stdout, text
    assert "norm" in result.stdout and "arc" in result.stdout


def test_figure(runs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    assert absorb("compare", *runs, "--figure", path).exit_code == 0
    image = imread(path)
    assert image.ndim == 3 and image.std() > 0
    assert "is a directory" in error_of("compare", *runs, "--figure", tmp_path)


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / part / "run" for part in ("a", "b")]
    for path in paths:
        write(path / "eval.json", TASKS)
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]


def test_unfinished_runs_have_no_sparsity(tmp_path: Path) -> None:
    write(tmp_path / "profile.json", make_profile(realised=None))
    (run,) = read_runs([tmp_path])
    assert run.sparsity is None and run.budget == 0.5


def test_what_is_counted_in_the_model_goes_before_the_report(tmp_path: Path) -> None:
    write(tmp_path / "profile.json", make_profile())
    write(tmp_path / "eval.json", TASKS | {"sparsity": 0.45, "model": "pruned"})
    (run,) = read_runs([tmp_path])
    assert run.sparsity == 0.45


def test_different_measures_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(compare.logger, "warning", warnings.append)
    arc = {"arc": {**TASKS["arc"], "n": 7}}
    paths = [
        write(tmp_path / "a.json", {"perplexity": 2.0, "tokens": 5} | TASKS),
        write(tmp_path / "b.json", {"perplexity": 2.0, "tokens": 6} | arc),
    ]
    read_runs([paths[0], paths[0]])
    assert warnings == []
    read_runs(paths)
    assert "the perplexity" in warnings[0] and "[5, 6]" in warnings[0]
    assert "task 'arc'" in warnings[1] and "[7, 100]" in warnings[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither profile.json .* nor eval.*json.*absorb eval"),
        ({"eval.json": {"accuracy": 1}}, "no result of `absorb eval`"),
        ({"eval.json": [1]}, "not a JSON object"),
        ({"eval.json": TASKS, "eval_2.json": TASKS}, "another file .* has 'arc'"),
        (
            {
                "eval_a.json": TASKS | {"model": "m", "sparsity": 0.0},
                "eval_b.json": {"perplexity": 2.0, "model": "m", "sparsity": 0.5},
            },
            "different models .sparsity 0.0 and 0.5",
        ),
        (
            {"profile.json": {"schema_version": 9}},
            "schema_version 9, this version reads 2",
        ),
    ],
)
def test_bad_runs(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        read_runs([tmp_path])


def test_one_model_by_two_spellings(tmp_path: Path) -> None:
    first = TASKS | {"model": str(tmp_path / "m"), "sparsity": 0.5}
    other = {"perplexity": 2.0, "tokens": 5, "sparsity": 0.5 + 1e-12}
    write(tmp_path / "eval_a.json", first)
    write(tmp_path / "eval_b.json", other | {"model": f"{tmp_path}/n/../m/"})
    (run,) = read_runs([tmp_path])
    assert run.perplexity == 2.0 and "arc" in run.tasks


def test_names_with_brackets_are_shown_whole(tmp_path: Path) -> None:
    settings = {"allocator": "mine[/x]", "strength": 0, "max_sparsity": 0.9}
    write(tmp_path / "profile.json", make_profile(settings=settings))
    write(tmp_path / "eval.json", {"a[/b]": TASKS["arc"]})
    result = absorb("compare", tmp_path)
    assert result.exit_code == 0, result.output
    assert "mine[/x]" in result.stdout and "a[/b]" in result.stdout


NAN = float("nan")
GOOD = {"perplexity": 2.0, "tokens": 5}
TINY = make_profile(1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("profile.json", {"schema_version": 2}, "model is missing"),
        ("profile.json", TINY | {"blocks": []}, "blocks=..: .*at least 1"),
        ("profile.json", TINY | {"blocks": [3]}, "blocks.0=3: "),
        ("profile.json", TINY | {"budget": "0.5"}, "budget='0.5': .*valid number"),
        ("profile.json", TINY | {"realised": NAN}, "realised=nan: .*finite"),
        ("profile.json", TINY | {"settings": {}}, "settings.allocator is missing"),
        ("eval.json", GOOD | {"perplexity": "12"}, "perplexity='12': .*valid number"),
        ("eval.json", GOOD | {"perplexity": NAN}, "perplexity=nan: .*greater than 0"),
        ("eval.json", GOOD | {"perplexity": True}, "perplexity=True: .*valid number"),
        ("eval.json", GOOD | {"perplexity": 0}, "perplexity=0: .*greater than 0"),
        ("eval.json", GOOD | {"tokens": [5]}, r"tokens=\[5\]: .*valid integer"),
        ("eval.json", GOOD | {"sparsity": 60.0}, "sparsity=60.0: .*less than or"),
        ("eval.json", GOOD | {"model": 7}, "model=7: .*valid string"),
        ("eval.json", {"arc": TASKS["arc"] | {"acc": None}}, "arc.acc=None: .*number"),
        ("eval.json", {"arc": TASKS["arc"] | {"stderr": NAN}}, "arc.stderr=nan"),
        ("eval.json", {"arc": {"acc": 0.5}}, "arc.n is missing"),
        ("eval.json", {"arc": {"n": 5, "stderr": 0.1}}, "arc.acc is missing"),
        ("eval.json", GOOD | {"tokens": 5.5}, "tokens=5.5: .*valid integer"),
        ("eval.json", {"arc": TASKS["arc"] | {"n": "x" * 99}}, "arc.n='x{39}…: "),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_runs([tmp_path])
    assert str(caught.value).startswith(f"{file}: ")
    assert "make it anew, or leave it out" in error_of("compare", tmp_path, "--json")


def test_results_of_other_programs(tmp_path: Path) -> None:
    """Objects that are no tasks, whole numbers as floats, and what overflowed."""
    content = {"perplexity": float("inf"), "tokens": 99.0, "config": {"n": 5}} | TASKS
    write(tmp_path / "eval.json", content)
    (run,) = read_runs([tmp_path])
    assert (run.perplexity, run.tokens, run.tasks) == (float("inf"), 99, TASKS)
    assert type(run.tokens) is int
    assert "inf" in absorb("compare", tmp_path).stdout
    result = absorb("compare", tmp_path, "--json", "--figure", tmp_path / "f.png")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["runs"][0]["perplexity"] is None


def test_files_that_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(ValueError, match="eval.json: not JSON"):
        read_runs([tmp_path])
    with pytest.raises(FileNotFoundError, match="none: no such run"):
        read_runs([tmp_path / "none"])
