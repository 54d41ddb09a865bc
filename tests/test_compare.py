import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_fixtures import model_dir, text_file, words  # noqa: F401  fixtures
from helpers.profiles import make_profile
from matplotlib.image import imread
from test_cli import absorb, error_of

from absorb_plugin import compare
from absorb_plugin.compare import Run, read_runs
from absorb_plugin.prune import check_output, kept_files, staged_directory

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


def test_files_that_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(ValueError, match="eval.json: not JSON"):
        read_runs([tmp_path])
    with pytest.raises(FileNotFoundError, match="none: no such run"):
        read_runs([tmp_path / "none"])


def test_eval_of_tasks(model_dir, text_file, tmp_path):  # noqa: F811
    row = {"query": words(5), "choices": ["word1", "word2 word3"], "gold": 0}
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    tasks = ["--tasks", tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    result = absorb("eval", model_dir, *tasks, "--limit", 2, "--json")
    assert result.exit_code == 0, result.output
    alone = json.loads(result.stdout)
    assert alone.keys() == {"one", "two"}
    assert alone["one"].keys() == {"acc", "acc_norm", "stderr", "n"}
    assert alone["one"]["n"] == 2

    out = tmp_path / "eval.json"
    text = ["--text", text_file, "--seq-len", 16, "--windows", 2]
    both = absorb("eval", model_dir, *tasks, *text, "--out", out, "--json")
    told = json.loads(both.stdout)
    assert told.keys() == {"perplexity", "tokens", "one", "two"}
    assert told["one"]["n"] == 3
    saved = json.loads(out.read_text())
    assert saved == {"model": str(model_dir), "sparsity": 0.0, **told}
    assert read_runs([tmp_path])[0].tasks["two"] == told["two"]

    people = absorb("eval", model_dir, *tasks, *text)
    assert re.match(r"Perplexity \d+\.\d+ over 30 tokens\n", people.stdout)
    assert "acc_norm" in people.stdout and "one" in people.stdout


def test_eval_errors_come_before_the_model(model_dir, tmp_path):  # noqa: F811
    (model_dir / "model.safetensors").rename(tmp_path / "hidden")
    try:
        bad = tmp_path / "bad.jsonl"
        bad.write_text(json.dumps({"query": "a", "choices": ["b", "c"]}) + "\n")
        line = error_of("eval", model_dir, "--tasks", bad)
        assert "bad.jsonl, line 1: field `gold`" in line
        assert "give --text, --dataset or --tasks" in error_of("eval", model_dir)
        assert "behind --tasks" in error_of("eval", model_dir, bad)
        line = error_of("eval", model_dir, "--tasks", bad, "--out", tmp_path)
        assert "--out" in line and "is a directory" in line
    finally:
        (tmp_path / "hidden").rename(model_dir / "model.safetensors")


def test_a_report_inside_the_new_model_stays(
    model_dir, text_file, tmp_path  # noqa: F811
):  # fmt: skip
    """`absorb prune` replaces the whole directory; the recipe wrote into it."""
    out, recipe = tmp_path / "pruned", tmp_path / "recipe.yaml"
    recipe.write_text(
        "prune_stage:\n"
        "  prune_modifiers:\n"
        "    AbsorptionAllocationModifier:\n"
        "      allocator: uniform\n"
        "      strength: 0\n"
        f"      report_dir: {out}/report\n"
        "    WandaPruningModifier:\n"
        "      sparsity: 0.5\n"
        '      targets: ["Linear"]\n'
        '      ignore: ["re:.*lm_head"]\n'
    )
    arguments = ["--recipe", recipe, "--text", text_file, "--samples", 4]
    arguments += ["--seq-len", 16, "--out", out]
    for overwrite in ([], ["--overwrite"]):
        result = absorb("prune", model_dir, *arguments, *overwrite)
        assert result.exit_code == 0, result.output
        assert {"profile.json", "profile.png", "report.html"} == {
            path.name for path in (out / "report").iterdir()
        }
        assert (out / "config.json").is_file()
        (run,) = read_runs([out])
        assert (run.allocation, run.pruner) == ("uniform", "WandaPruningModifier")
        assert run.sparsity == pytest.approx(0.5, abs=0.02)
        assert not (out / "stale.txt").exists()
        (out / "stale.txt").write_text("of the run before")


def test_a_run_that_fails_leaves_no_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(RuntimeError),
        staged_directory(out) as staging,
        kept_files(out, staging),
    ):
        write(out / "report" / "profile.json", {})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_empty_directories_are_no_files(tmp_path: Path) -> None:
    """What a run leaves that is killed after it made room for its report."""
    (tmp_path / "out" / "report").mkdir(parents=True)
    check_output(tmp_path / "out", overwrite=False)
    write(tmp_path / "out" / "report" / "profile.json", {})
    with pytest.raises(FileExistsError, match="is not empty"):
        check_output(tmp_path / "out", overwrite=False)
