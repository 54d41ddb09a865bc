"""`absorb profile`: several η on one sweep."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from cli_fixtures import model_dir, text_file  # noqa: F401  fixtures
from matplotlib.image import imread
from test_absorption import measured
from test_cli import absorb, error_of, files_in

from absorb_plugin.dose import as_dict, measure_doses, parse_magnitudes, render
from absorb_plugin.report.figure import draw
from absorb_plugin.report.noise_figure import noise_charts


def test_doses_are_those_of_single_probes() -> None:
    model = tiny.make_model("llama")
    before = tiny.snapshot(model)
    found = measure_doses(model, tiny.make_dataset(3, 12), [1e-2, 1.0], seed=7)
    tiny.assert_untouched(model, before)
    alone = measured(model, tiny.make_batch(3, 12), sink_tokens="auto")
    np.testing.assert_allclose(found.profiles[0].ratio, alone.ratio, rtol=1e-6)
    np.testing.assert_allclose(found.profiles[0].drift, alone.drift, rtol=1e-6)
    assert found.profiles[1].drift[0, 0] == pytest.approx(1.0, rel=1e-3)
    assert found.drowned() == []


def test_small_noise_in_16_bits_drowns() -> None:
    model = tiny.make_model("llama").bfloat16()
    found = measure_doses(model, tiny.make_dataset(3, 12), [1e-4, 1.0])
    assert found.drowned() == [1e-4]
    text = io.StringIO()
    render(found, text)
    assert "η=0.0001*" in text.getvalue() and "η=1 " in text.getvalue()
    exact = measure_doses(
        model, tiny.make_dataset(3, 12), [1e-4, 1.0], noise_dtype="float32"
    )
    assert exact.drowned() == [] and exact.dtype == "float32"


def test_dictionary_and_figure() -> None:
    found = measure_doses(
        tiny.make_model("falcon_h1"), tiny.make_dataset(2, 12), [0.01, 0.1, 0.3, 1]
    )
    content = json.loads(json.dumps(as_dict(found), allow_nan=False))
    assert content["blocks"] == found.names
    assert [entry["eta"] for entry in content["eta"]] == [0.01, 0.1, 0.3, 1]
    for entry in content["eta"]:
        assert entry["drift"][1][0] is None and entry["drift"][1][1] > 0
        assert entry["ratio"][-1] == 1.0
    assert len(content["floor"]) == 3
    image = imread(io.BytesIO(draw(noise_charts(content), "falcon", columns=3)))
    assert image.shape[0] > 400 and image.shape[1] > 1000
    assert image[..., :3].std() > 0.05


@pytest.mark.parametrize("text", ["", "1e-2,", "0", "-1", "nan", "inf", "a,b"])
def test_bad_magnitudes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--eta"):
        parse_magnitudes(text)


def test_magnitudes_are_sorted() -> None:
    assert parse_magnitudes("1, 0.1,1e-3,0.1") == [1e-3, 0.1, 1.0]


def test_command(model_dir: Path, text_file: Path, tmp_path: Path) -> None:  # noqa: F811
    figure = tmp_path / "profile.png"
    options = ["--text", text_file, "--samples", 2, "--seq-len", 16, "--eta", "1e-2,1"]
    result = absorb("profile", model_dir, *options, "--json", "--figure", figure)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["samples"] == 2 and len(found["eta"]) == 2
    assert files_in(tmp_path) == {"profile.png"}
    table = absorb("profile", model_dir, *options)
    assert "model.layers.1" in table.stdout and "rounding floor" in table.stdout


def test_a_figure_that_cannot_be_written_is_refused_first(
    model_dir: Path,  # noqa: F811
    text_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    line = error_of(
        "profile", model_dir, "--text", text_file, "--figure", tmp_path / "no" / "a.png"
    )
    assert "--figure" in line and "is no directory" in line
