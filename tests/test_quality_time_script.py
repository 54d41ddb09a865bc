"""integration/benchmarks/quality_time.py: what is timed, and the table."""

import json
import sys
from pathlib import Path

import pytest
from helpers.benchmarks import imported


def test_every_run_is_timed_beside_the_allocation(
    model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.jsonl"
    command = ["quality_time.py", str(model_dir), "--text", str(text_file)]
    command += ["--out", str(out)]
    command += ["--pruners", "wanda", "--bounds", "5", "--curve", "0.3,0.4"]
    command += ["--samples", "8", "--seq-len", "16", "--repetitions", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--effort", "quick"])
    with imported("quality_time") as script:
        script.main()
    names = ["one allocation", "bound of 5", "curve of 2 sparsities"]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["run"] for line in lines] == 2 * names
    assert all(line["seconds"] > 0 for line in lines)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[2].strip() for row in rows] == names


def test_ratios_are_of_medians_and_of_the_same_pruner() -> None:
    with imported("quality_time") as script:
        of_wanda, of_sparsegpt = ("wanda", "one allocation"), ("sparsegpt", "bound")
        table = script.table(
            {
                of_wanda: [1.0, 2.0, 30.0],
                ("wanda", "bound"): [3.0, 90.0, 1.0],
                ("sparsegpt", "one allocation"): [4.0],
                of_sparsegpt: [10.0],
            }
        )
    assert "| wanda | one allocation | 2.0 |  |" in table
    assert "| wanda | bound | 3.0 | 1.5 |" in table
    assert "| sparsegpt | bound | 10.0 | 2.5 |" in table
