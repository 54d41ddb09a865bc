"""profile.json, and what stands beside it."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import runs, tiny
from helpers.search import STEEP, search_ends_at_uniform
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.recipe import Recipe
from matplotlib.image import imread

from absorb_plugin import files
from absorb_plugin.report import figure
from absorb_plugin.report import profile as report_profile
from absorb_plugin.report.page import render
from absorb_plugin.report.profile_charts import profile_charts
from absorb_plugin.sample_split import SampleUse
from absorb_plugin.search.confirm import Confirmed

KEYS = {
    "schema_version",
    "run",
    "model",
    "pruner",
    "level",
    "calibration",
    "samples",
    "recipe",
    "command",
    "settings",
    "noise",
    "search",
    "confirmed",
    "quality",
    "budget",
    "achieved",
    "realised",
    "zeros_lost",
    "other_weights",
    "blocks",
    "unseen_linears",
    "versions",
}
BLOCK_KEYS = {
    "name",
    "parameters",
    "base_metric",
    "base_sparsity",
    "drift",
    "realignment",
    "ratio",
    "ratio_error",
    "direction",
    "sparsity",
    "realised_sparsity",
    "linears",
}


def strict_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_report_of_a_whole_run(tmp_path: Path) -> None:
    model = tiny.make_model("llama")
    folder = tmp_path / "new" / "report"
    ours = runs.absorption(strength="auto", rounds=2, report_dir=folder)
    runs.run(model, [ours, runs.pruner("wanda")], tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "profile.json",
        "profile.png",
        "report.html",
    ]
    image = imread(io.BytesIO((folder / "profile.png").read_bytes()))
    assert image.ndim == 3 and image.std() > 0
    assert image.shape[0] > 1300  # four panels
    profile = strict_json(folder / "profile.json")
    assert profile.keys() == KEYS
    assert profile["schema_version"] == report_profile.SCHEMA_VERSION
    assert profile["model"]["class"] == "LlamaForCausalLM"
    assert profile["model"]["dtype"] == "float32"
    assert profile["pruner"] == "WandaPruningModifier"
    assert profile["calibration"] == {
        "samples": 6,
        "tokens": 6 * 16,
        "longest": 16,
    }
    assert profile["settings"]["allocator"] == "owl"
    # what the user wrote, not what became of it
    assert yaml.safe_load(profile["recipe"]) == {
        "prune_stage": {
            "prune_modifiers": {
                "AbsorptionAllocationModifier": {
                    **runs.QUICK,
                    "strength": "auto",
                    "rounds": 2,
                    "report_dir": str(folder),
                },
                "WandaPruningModifier": {
                    "sparsity": 0.5,
                    "targets": ["Linear"],
                    "ignore": ["re:.*lm_head"],
                },
            }
        }
    }
    assert profile["command"] is None  # pytest's own is not ours to publish
    assert (folder / "report.html").read_text() == render(profile)
    assert profile["settings"]["effort"] == "standard"
    assert profile["noise"]["magnitude"] == 0.01 and profile["noise"]["seed"] == 0
    assert profile["budget"] == 0.5
    assert profile["achieved"] == pytest.approx(0.5, abs=1e-6)
    assert profile["search"].keys() == {
        "start",
        "base_loss",
        "uniform_loss",
        "loss",
        "rounds",
        "steps",
        "judged",
        "taken",
    }
    assert len(profile["search"]["steps"]) == 2
    for step in profile["search"]["steps"]:
        assert step.keys() == {"loss", "length", "largest"}
    points = {point["steps"]: point["loss"] for point in profile["search"]["judged"]}
    assert points[profile["search"]["taken"]] == profile["search"]["loss"]
    assert len(profile["blocks"]) == 3
    zeros = weights = 0
    for index, block in enumerate(profile["blocks"]):
        assert block.keys() == BLOCK_KEYS
        assert block["name"] == f"model.layers.{index}"
        assert block["drift"][:index] == [None] * index
        assert all(value > 0 for value in block["drift"][index:])
        names = [f"{block['name']}.{name}" for name in block["linears"]]
        counts = runs.zeros(model, names)
        own = sum(sum(rows) for rows in counts.values())
        size = sum(model.get_submodule(name).weight.numel() for name in names)
        assert block["parameters"] == size
        for name, linear in block["linears"].items():
            rows = counts[f"{block['name']}.{name}"]
            expected = sum(rows) / linear["parameters"]
            assert linear["realised_sparsity"] == pytest.approx(expected)
            assert linear["base_sparsity"] == block["base_sparsity"]
        assert block["realised_sparsity"] == pytest.approx(own / size, abs=1e-12)
        # Wanda takes int(columns · s): under one weight per row below the target
        assert 0 <= block["sparsity"] - block["realised_sparsity"] < 1 / 32
        zeros, weights = zeros + own, weights + size
    assert profile["realised"] == pytest.approx(zeros / weights, abs=1e-12)
    assert profile["blocks"][-1]["ratio"] == 1.0


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
def test_what_was_confirmed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    search_ends_at_uniform(monkeypatch)
    model = tiny.make_model("llama", num_hidden_layers=2)
    ours = runs.absorption(strength="auto", report_dir=tmp_path, **STEEP)
    runs.run(model, [ours, runs.pruner(kind)], tmp_path, samples=8)
    profile = strict_json(tmp_path / "profile.json")
    confirmed = profile["confirmed"]
    assert confirmed["judge"] == kind
    assert {"base", "uniform", "searched"} <= confirmed["losses"].keys()
    losses, chosen = confirmed["losses"], confirmed["chosen"]
    assert confirmed["gain"] == pytest.approx(losses["base"] - losses[chosen], abs=1e-6)
    assert confirmed["standard_error"] > 0 or confirmed["chosen"] == "base"
    assert confirmed["chose_nothing"] is not confirmed["anew"]
    uses = {entry["use"]: entry for entry in profile["samples"]}
    assert {"statistics", "search", "confirm"} <= uses.keys()
    assert uses["confirm"]["tokens"] == 16 * uses["confirm"]["samples"] > 0


def test_a_bound_on_the_loss_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    model = tiny.make_model("llama", num_hidden_layers=2)
    ours = runs.absorption(
        strength="auto", rounds=1, max_loss_increase=5.0, report_dir=tmp_path, **STEEP
    )
    runs.run(model, [ours, runs.pruner(sparsity=0.4)], tmp_path, samples=8)
    profile = strict_json(tmp_path / "profile.json")
    quality = profile["quality"]
    assert quality["max_loss_increase"] == 5.0 and quality["found"] == 0.4
    assert profile["budget"] == pytest.approx(0.4)
    (point,) = quality["curve"]  # the largest budget keeps so loose a bound
    assert point["sparsity"] == 0.4 and point["standard_error"] >= 0
    assert {block["direction"] for block in profile["blocks"]} == {None}
    assert {"pruning", "confirm"} <= {entry["use"] for entry in profile["samples"]}
    page = (tmp_path / "report.html").read_text()
    assert "Sparsity 40.0% was found. Pruning to it costs" in page


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
def test_what_was_never_asked_served_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single group has the budget; that of SparseGPT is compared with itself."""
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    model = tiny.make_model("llama", num_hidden_layers=1)
    ours = runs.absorption(
        strength="auto", level="block", signal="auto", report_dir=tmp_path
    )
    runs.run(model, [ours, runs.pruner(kind)], tmp_path, samples=8)
    profile = strict_json(tmp_path / "profile.json")
    assert (profile["confirmed"] is None) == (kind == "wanda")
    uses = {entry["use"] for entry in profile["samples"]}
    compared = {"pruning", "confirm"} if profile["confirmed"] else set()
    assert uses == {"statistics", "signal", "search"} | compared
    assert "Nothing could be corrected" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("confirm", "chose_nothing"), [(5, True), (2, False)])
def test_samples_that_chose_are_told_from_those_that_did_not(
    confirm: int, chose_nothing: bool
) -> None:
    """By their tokens: a sample that was cut or copied is another object."""

    def sample(first: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[first, 7, 8]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    allocation = SimpleNamespace(
        quality=None,
        confirmed=Confirmed(np.array([]), "base", {"base": 1.0}, 0.0, np.nan),
        samples=[
            SampleUse("search", [sample(1), sample(2)]),
            SampleUse("confirm", [sample(confirm), sample(6)]),
        ],
    )
    entry = report_profile.confirmed_entry(allocation, "wanda")
    assert entry["chose_nothing"] is chose_nothing
    assert entry["standard_error"] is None
    allocation.quality = "a bound was kept on the same samples"
    assert not report_profile.confirmed_entry(allocation, "wanda")["chose_nothing"]


def test_a_target_for_every_linear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    model = tiny.make_model("llama", num_hidden_layers=2)
    ours = runs.absorption(level="linear", report_dir=tmp_path)
    runs.run(model, [ours, runs.pruner()], tmp_path)
    profile = strict_json(tmp_path / "profile.json")
    assert profile["level"] == "linear"
    for block in profile["blocks"]:
        targets = [linear["sparsity"] for linear in block["linears"].values()]
        assert len(set(targets)) > 1
        sizes = [linear["parameters"] for linear in block["linears"].values()]
        mean = sum(s * p for s, p in zip(targets, sizes)) / sum(sizes)
        assert block["sparsity"] == pytest.approx(mean)
        for linear in block["linears"].values():
            assert linear["base_sparsity"] == block["base_sparsity"]
    titles = [chart.title for chart in profile_charts(profile)]
    assert "Sparsity per Linear" in titles


def test_a_figure_that_cannot_be_drawn_costs_no_run(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ValueError("no font")

    monkeypatch.setattr(figure, "draw", fail)
    model = tiny.make_model("llama", num_hidden_layers=2)
    ours = runs.absorption(allocator="uniform", strength=0, report_dir=tmp_path / "r")
    runs.run(model, [ours, runs.pruner()], tmp_path)
    assert strict_json(tmp_path / "r" / "profile.json")["realised"] == 0.5
    files = {path.name for path in (tmp_path / "r").iterdir()}
    assert files == {"profile.json", "report.html"}
    told = [line for line in warnings if "profile.png could not be made" in line]
    assert len(told) == 2 and "ValueError: no font" in told[0]


def test_a_model_called_by_dollars_is_reported(
    tmp_path: Path, warnings: list[str]
) -> None:
    model = tiny.make_model("llama", num_hidden_layers=2)
    model.name_or_path = r"run$\oops$"
    ours = runs.absorption(allocator="uniform", strength=0, report_dir=tmp_path / "r")
    runs.run(model, [ours, runs.pruner()], tmp_path)
    assert (tmp_path / "r" / "profile.png").stat().st_size > 1000
    assert not any("could not be made" in line for line in warnings)
    profile = strict_json(tmp_path / "r" / "profile.json")
    assert profile["model"]["name_or_path"] == r"run$\oops$"


def test_what_was_not_measured_is_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    model = tiny.make_model("llama", num_hidden_layers=2)
    ours = runs.absorption(allocator="uniform", strength=0, report_dir=tmp_path)
    runs.run(model, [ours, runs.pruner()], tmp_path)
    profile = strict_json(tmp_path / "profile.json")
    assert profile["noise"] is None and profile["search"] is None
    for block in profile["blocks"]:
        assert block["drift"] is block["ratio"] is None
        assert block["sparsity"] == block["base_sparsity"] == 0.5
        assert block["direction"] is None
    assert profile["samples"] == []
    (chart,) = profile_charts(profile)  # of sparsities, and nothing of what is missing
    assert chart.title == "Sparsity per block"


def test_one_sample_has_no_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    model = tiny.make_model("llama", num_hidden_layers=2)
    ours = runs.absorption(signal="noise", report_dir=tmp_path)
    runs.run(model, [ours, runs.pruner()], tmp_path, samples=1)
    profile = strict_json(tmp_path / "profile.json")
    assert [block["ratio_error"] for block in profile["blocks"]] == [None] * 2


def test_sinks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    model = tiny.make_model("llama", num_hidden_layers=2)
    dataset = tiny.make_dataset(4)
    rows = [[3, *[max(4, token) for token in row[1:]]] for row in dataset["input_ids"]]
    model.get_input_embeddings().weight.data[3] *= 1000
    dataset = dataset.remove_columns("input_ids").add_column("input_ids", rows)
    ours = runs.absorption(signal="noise", report_dir=tmp_path)
    runs.run(model, [ours, runs.pruner()], tmp_path, dataset=dataset, samples=4)
    noise = strict_json(tmp_path / "profile.json")["noise"]
    assert noise["spared_positions"] == {"model.layers.0": [0], "model.layers.1": [0]}
    assert noise["tokens"] == 4 * 15


def test_two_peers_share_nothing_but_the_modifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    model = tiny.make_model("llama", num_hidden_layers=2)
    ours = runs.absorption(report_dir=tmp_path)
    attention = runs.pruner(sparsity=0.3, targets=[r"re:.*self_attn\..*_proj$"])
    mlp = runs.pruner("sparsegpt", sparsity=0.6, targets=[r"re:.*mlp\..*_proj$"])
    runs.run(model, [ours, attention, mlp], tmp_path)
    first = strict_json(tmp_path / "profile.json")
    second = strict_json(tmp_path / "profile_2.json")
    pages = [(tmp_path / f"report{n}.html").read_text() for n in ("", "_2")]
    assert "WandaPruningModifier at 30%" in pages[0]
    assert "SparseGPTModifier at 60%" in pages[1]
    assert 'href="profile_2.json"' in pages[1]
    assert first["pruner"] == "WandaPruningModifier"
    assert second["pruner"] == "SparseGPTModifier"
    for profile, part, budget in ((first, "self_attn", 0.3), (second, "mlp", 0.6)):
        names = {name for block in profile["blocks"] for name in block["linears"]}
        assert names and all(name.startswith(part) for name in names)
        assert profile["achieved"] == pytest.approx(budget, abs=1e-6)
        assert profile["realised"] == pytest.approx(budget, abs=0.03)


def test_files_are_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(b"old")

    def full_disk(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="no space"):
            files.replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["profile.json"]
    files.replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/bin/absorb", "prune", "a b", "--out", "c"], "absorb prune 'a b' --out c"),
        (["train.py", "--token", "secret"], None),
    ],
)
def test_only_our_own_command_is_told(
    argv: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", argv)
    assert report_profile.command_line() == expected


def test_modifiers_that_share_a_directory_number_their_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    plain = {"strength": 0, "allocator": "uniform"}
    recipe = [
        runs.absorption(**plain, report_dir=tmp_path / "one"),
        runs.pruner("sparsegpt", targets=["re:.*q_proj$"]),
        runs.pruner("wanda", targets=["re:.*k_proj$"]),
        runs.absorption(**plain, report_dir=tmp_path / "one"),
        runs.pruner("sparsegpt", targets=["re:.*v_proj$"]),
        runs.absorption(**plain, report_dir=tmp_path / "other"),
        runs.pruner("wanda", targets=["re:.*mlp.*"]),
    ]
    runs.run(tiny.make_model("llama", num_hidden_layers=2), recipe, tmp_path)
    found = {path: strict_json(path) for path in tmp_path.glob("o*/*.json")}
    pruned = {
        path.relative_to(tmp_path).as_posix(): [*profile["blocks"][0]["linears"]]
        for path, profile in found.items()
    }
    assert pruned == {
        "one/profile.json": ["self_attn.q_proj"],
        "one/profile_2.json": ["self_attn.k_proj"],
        "one/profile_3.json": ["self_attn.v_proj"],
        "other/profile.json": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    }


UNEXPECTED = [
    ("datafree", {}, r"sparsity 0\.0000 realised, 0\.3000 asked.*pipeline: datafree"),
    ("basic", {"sparsity": 0.6}, r"0\.6\d+ realised, 0\.3000 asked.*the same Linears"),
]


@pytest.mark.parametrize("pipeline, fields, told", UNEXPECTED, ids=["no data", "twice"])
def test_a_sparsity_that_is_missed_is_a_warning(
    pipeline: str, fields: dict, told: str, tmp_path: Path, warnings: list[str]
) -> None:
    ours = runs.absorption(strength=0, allocator="uniform")
    recipe = [ours, runs.pruner(sparsity=0.3)]
    if fields:
        recipe += [runs.pruner("sparsegpt", **fields)]
    model = tiny.make_model("llama", num_hidden_layers=2)
    runs.run(model, recipe, tmp_path, pipeline=pipeline)
    assert any(re.search(told, message) for message in warnings)


def test_a_run_that_failed_reports_nothing_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: list[str]
) -> None:
    class Failing(WandaPruningModifier):
        def compress_modules(self) -> None:
            raise RuntimeError("broken on purpose")

    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    fields = {"sparsity": 0.5, "targets": ["Linear"], "ignore": ["lm_head"]}
    ours = runs.absorption(strength=0, allocator="uniform", report_dir=tmp_path)
    model = tiny.make_model("llama", num_hidden_layers=2)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        runs.run(model, [ours, Failing(**fields)], tmp_path)
    logs.clear()
    runs.run(model, [runs.pruner()], tmp_path)
    assert not [line for line in logs if "replays without" in line]
    assert strict_json(tmp_path / "profile.json")["realised"] is None


@pytest.mark.parametrize("where", ["on_calibration_start", "compress_modules"])
def test_a_run_that_failed_after_its_pruner_reports_nothing_later(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: list[str]
) -> None:
    class Failing(GPTQModifier):
        pass

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken on purpose")

    setattr(Failing, where, fail)
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    ours = runs.absorption(strength=0, allocator="uniform", report_dir=tmp_path)
    after = Failing(targets=["Linear"], scheme="W8A8", ignore=["lm_head"])
    model = tiny.make_model("llama", num_hidden_layers=2)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        runs.run(model, [ours, runs.pruner(), after], tmp_path)
    logs.clear()
    other = tiny.make_model("llama", num_hidden_layers=2)
    runs.run(other, [runs.pruner()], tmp_path)
    told = ("replays without", "realised", "zeros that")
    assert not [line for line in logs for part in told if part in line]
    assert strict_json(tmp_path / "profile.json")["realised"] is None


def test_two_modifiers_of_one_class_are_both_in_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")
    ours = runs.absorption(strength=0, allocator="uniform", report_dir=tmp_path)
    parts = [
        runs.pruner(sparsity=s, targets=[rf"re:.*{part}\..*_proj$"])
        for s, part in ((0.3, "self_attn"), (0.6, "mlp"))
    ]
    model = tiny.make_model("llama", num_hidden_layers=2)
    runs.run(model, [ours, *parts], tmp_path)
    recipe = Recipe.create_instance(strict_json(tmp_path / "profile.json")["recipe"])
    assert [modifier.sparsity for modifier in recipe.modifiers[1:]] == [0.3, 0.6]
