"""`absorb check`."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import runs, tiny
from helpers.cli import absorb, error_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "model"
    model = tiny.make_model("llama", num_hidden_layers=2)
    runs.run(model, [runs.pruner()], out.parent, output_dir=str(out))
    return out


def test_for_people(saved: Path) -> None:
    done = absorb("check", saved, "--load")
    assert done.exit_code == 0, done.output
    assert "model.layers.1" in done.stdout and "0.5000" in done.stdout
    assert "zeros there" not in done.stdout
    assert "transformers loads it: yes" in done.stdout
    assert f"serve: vllm serve {saved}" in done.stdout
    assert done.stdout.endswith("nothing is broken\n")


def test_json(saved: Path) -> None:
    done = absorb("check", saved, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    names = [block["name"] for block in found["blocks"]]
    assert names == ["model.layers.0", "model.layers.1"]
    assert found["planned"] == 0.5 and found["zeros"] == pytest.approx(0.5, abs=0.02)
    assert found["loads"] is None and found["problems"] == []
    assert len(found["linears"]) == 14


def test_what_is_planned_stands_beside_the_zeros_of_the_same(tmp_path: Path) -> None:
    """Over all Linears there are fewer, where some are ignored."""
    model = tiny.make_model("llama", num_hidden_layers=2)
    ignore = ["re:.*lm_head", "re:.*layers.0.mlp.*"]
    out = tmp_path / "model"
    runs.run(model, [runs.pruner(ignore=ignore)], tmp_path, output_dir=str(out))
    done = absorb("check", out)
    told = done.stdout.splitlines()[1]
    assert told.endswith(
        "in those of the plan 0.5000, planned 0.5000 (3 Linears are not in it)"
    )
    assert "zeros there" in done.stdout
    found = json.loads(absorb("check", out, "--json").stdout)
    assert found["planned"] == found["planned_zeros"] == 0.5 and found["zeros"] < 0.4
    first, second = found["blocks"]
    assert first["planned_zeros"] == second["planned_zeros"] == 0.5
    assert first["zeros"] < 0.3 and second["zeros"] == 0.5


def test_what_is_broken_ends_with_1(saved: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(saved, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["sparsity_config"] = {"format": "dense", "targets": ["Linear"]}
    (model / "config.json").write_text(json.dumps(config))
    done = absorb("check", model)
    assert done.exit_code == 1
    assert "BROKEN: config.json has a `sparsity_config`" in done.stdout
    assert done.stdout.endswith("\nbroken\n")
    done = absorb("check", model, "--json")
    assert done.exit_code == 1 and len(json.loads(done.stdout)["problems"]) == 1


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    assert "no such directory" in error_of("check", tmp_path / "none")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge it into its base model" in error_of("check", tmp_path)
