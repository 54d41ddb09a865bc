"""Several η in one forward."""

import io
import json

import numpy as np
import pytest
from helpers import tiny
from helpers.probes import run
from matplotlib.image import imread

from absorb_plugin.report.figure import draw
from absorb_plugin.report.noise_figure import noise_charts
from absorb_plugin.signals.noise import NoiseProbe
from absorb_plugin.signals.noise_scan import as_dict, scan_noise


def test_each_magnitude_is_as_if_alone() -> None:
    model = tiny.make_model("llama")
    before = tiny.snapshot(model)
    found = scan_noise(model, tiny.make_dataset(3, 12), [1e-2, 1.0], seed=7)
    tiny.assert_untouched(model, before)
    probe = NoiseProbe(range(3), 3, 1e-2, 7)
    run(model, [tiny.make_batch(3, 12)], probe)
    alone = probe.result()
    np.testing.assert_allclose(found.profiles[0].ratio, alone.ratio, rtol=1e-6)
    np.testing.assert_allclose(found.profiles[0].drift, alone.drift, rtol=1e-6)
    assert found.profiles[1].drift[0, 0] == pytest.approx(1.0, rel=1e-3)
    assert found.below_floor() == []


def test_small_noise_in_16_bits_is_below_the_floor() -> None:
    model = tiny.make_model("llama").bfloat16()
    found = scan_noise(model, tiny.make_dataset(3, 12), [1e-4, 1.0])
    assert found.below_floor() == [1e-4]
    exact = scan_noise(
        model, tiny.make_dataset(3, 12), [1e-4, 1.0], noise_dtype="float32"
    )
    assert exact.below_floor() == [] and exact.dtype == "float32"


def test_dictionary_and_figure() -> None:
    found = scan_noise(
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
