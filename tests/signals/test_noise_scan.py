"""Several η on one sweep."""

import io
import json

import numpy as np
import pytest
from absorb_plugin.dose import as_dict, measure_doses
from helpers import tiny
from matplotlib.image import imread
from test_absorption import measured

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
