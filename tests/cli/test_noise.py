"""`absorb noise`."""

import json
from pathlib import Path

import pytest
from helpers.cli import absorb, error_of, files_in

from absorb_plugin.cli.noise import _parse_magnitudes


@pytest.mark.parametrize("text", ["", "1e-2,", "0", "-1", "nan", "inf", "a,b"])
def test_bad_magnitudes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--eta"):
        _parse_magnitudes(text)


def test_magnitudes_are_sorted() -> None:
    assert _parse_magnitudes("1, 0.1,1e-3,0.1") == [1e-3, 0.1, 1.0]


def test_command(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    figure = tmp_path / "noise.png"
    options = ["--text", text_file, "--samples", 2, "--seq-len", 16, "--eta", "1e-2,1"]
    result = absorb("noise", model_dir, *options, "--json", "--figure", figure)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["samples"] == 2 and len(found["eta"]) == 2
    assert files_in(tmp_path) == {"noise.png"}
    table = absorb("noise", model_dir, *options)
    for part in ("model.layers.1", "η=0.01", "η=1", "rounding floor"):
        assert part in table.stdout


def test_a_wide_table_loses_no_number(model_dir: Path, text_file: Path) -> None:
    etas = [f"{0.001 * 3**k:.4g}" for k in range(11)]
    options = ["--text", text_file, "--samples", 2, "--seq-len", 16]
    result = absorb("noise", model_dir, *options, "--eta", ",".join(etas))
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout


def test_a_figure_that_cannot_be_written_is_refused_first(
    model_dir: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    line = error_of(
        "noise", model_dir, "--text", text_file, "--figure", tmp_path / "no" / "a.png"
    )
    assert "--figure" in line and "is no directory" in line
