"""An allocation without pruning is the one that `oneshot` makes."""

import json
from pathlib import Path

import pytest
from helpers import runs, tiny

from absorb_plugin.evaluation.allocation import allocate_model


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_base_of_oneshot(name: str, tmp_path: Path) -> None:
    """There every expert sees every token."""
    fields = {"allocator": "owl", "strength": 0}
    samples = tiny.make_dataset(6)
    found = allocate_model(
        tiny.make_model(name), samples, 0.5, runs.absorption(**fields)
    )
    recipe = [runs.absorption(**fields, report_dir=tmp_path / "r"), runs.pruner()]
    runs.run(tiny.make_model(name), recipe, tmp_path, dataset=samples)
    profile = json.loads((tmp_path / "r" / "profile.json").read_text())
    metrics = [block["base_metric"] for block in profile["blocks"]]
    assert found.base.metric.tolist() == pytest.approx(metrics, rel=1e-5)
