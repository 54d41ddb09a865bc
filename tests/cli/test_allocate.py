"""`absorb allocators` and `absorb allocate`."""

import json
from typing import Any

import numpy as np
import pytest
from helpers.cli import absorb, error_of
from transformers import AutoModelForCausalLM

from absorb_plugin.plugins import allocators

BUILTINS = ["uniform", "owl", "alpha_pruning", "dlp", "lsa", "atp"]
SMALL = ["--samples", "4", "--seq-len", "16"]
BLOCKS = ["model.layers.0", "model.layers.1"]
# hidden size 32, two of four heads' keys and values, 64 wide in the MLP
SIZES = {
    "q_proj": 32 * 32,
    "k_proj": 16 * 32,
    "v_proj": 16 * 32,
    "o_proj": 32 * 32,
    "gate_proj": 64 * 32,
    "up_proj": 64 * 32,
    "down_proj": 64 * 32,
}


@pytest.fixture
def allocate(model_dir, text_file):
    def run(allocator: str, *options: object, sparsity: float = 0.6) -> dict[str, Any]:
        result = absorb(
            "allocate", model_dir, "--allocator", allocator, "--sparsity", sparsity,
            "--text", text_file, *SMALL, "--json", *options,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert result.stdout.count("\n") == 1
        found = json.loads(result.stdout)
        check(found, allocator, sparsity)
        return found

    return run


def check(found: dict[str, Any], allocator: str, sparsity: float) -> None:
    """The shape, the budget, and that a block is the mean of its Linears."""
    named = {"allocator": allocator, "pruner": "wanda", "sparsity": sparsity}
    assert {**found, **named} == found
    assert set(found) == {*named, "level", "achieved", "blocks"}
    assert found["achieved"] == pytest.approx(sparsity, abs=1e-6)
    blocks = found["blocks"]
    assert [block["name"] for block in blocks] == BLOCKS
    for block in blocks:
        keys = {"name", "parameters", "metric", "base_sparsity", "sparsity", "linears"}
        assert set(block) == keys
        assert block["parameters"] == sum(SIZES.values())
        assert list(block["linears"]) == list(SIZES)
        for key in ("base_sparsity", "sparsity"):
            targets = [linear[key] for linear in block["linears"].values()]
            mean = np.average(targets, weights=list(SIZES.values()))
            assert block[key] == pytest.approx(mean, abs=1e-6)
    assert np.mean(column(found, "base_sparsity")) == pytest.approx(sparsity)
    assert np.mean(column(found, "sparsity")) == pytest.approx(sparsity)


def column(found: dict[str, Any], key: str) -> list[float]:
    return [block[key] for block in found["blocks"]]


def test_linears_left_dense(model_dir, text_file, tmp_path):
    given = [model_dir, "--allocator", "owl", "--sparsity", "0.5", "--text", text_file]
    given += SMALL
    out = tmp_path / "recipe.yaml"
    result = absorb(
        "allocate", *given, "--ignore", "re:.*down_proj", "--recipe-out", out, "--json"
    )
    assert result.exit_code == 0, result.output
    names = set(json.loads(result.stdout)["blocks"][0]["linears"])
    assert names == {*SIZES} - {"down_proj"}
    assert "up_proj" in out.read_text() and "down_proj" not in out.read_text()
    assert "ignore holds 're:('" in error_of("allocate", *given, "--ignore", "re:(")
    told = error_of("allocate", *given, "--ignore", "re:.*")
    assert "leaves no Linear" in told


# --- absorb allocators ------------------------------------------------------------


def test_allocators_json():
    result = absorb("allocators", "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    listed = {entry["name"]: entry for entry in json.loads(result.stdout)}
    assert list(listed) == list(allocators())
    assert list(listed)[:6] == BUILTINS
    for name in BUILTINS:
        assert set(listed[name]) == {
            *("name", "distribution", "arguments", "needs", "granularities"),
            *("cost", "paper", "required"),
        }
        assert listed[name]["distribution"].startswith("absorb-plugin ")
        assert listed[name]["paper"].startswith("https://")
    assert listed["owl"]["arguments"] == {"m": 5.0, "lmbda": 0.08}
    assert listed["alpha_pruning"]["granularities"] == ["block", "linear"]
    assert listed["uniform"]["needs"] == "none"


def test_allocators_for_people():
    result = absorb("allocators")
    assert result.exit_code == 0, result.output
    for name in BUILTINS:
        assert name in result.stdout


# --- absorb allocate --------------------------------------------------------------


@pytest.mark.parametrize("allocator", BUILTINS)
def test_without_correction_the_base_is_the_answer(allocate, allocator):
    found = allocate(allocator, "--no-correction")
    assert column(found, "sparsity") == column(found, "base_sparsity")
    assert (len(set(column(found, "base_sparsity"))) == 1) == (allocator == "uniform")
    for block in found["blocks"]:
        own = [linear.get("metric") for linear in block["linears"].values()]
        if allocator in ("alpha_pruning", "lsa"):
            assert block["metric"] == pytest.approx(np.mean(own))
        else:
            assert set(own) == {None}


def test_deterministic_in_the_seed(allocate):
    first, second = (allocate("owl", "--seed", 3) for _ in range(2))
    assert first == second
    assert column(first, "metric") != column(allocate("owl", "--seed", 4), "metric")


@pytest.mark.parametrize("allocator", ["owl", "alpha_pruning", "dlp"])
@pytest.mark.parametrize("correction", ["--correction", "--no-correction"])
def test_granularity_linear(allocate, allocator, correction):
    # near the cap of 0.95, where what a Linear cannot take goes to others
    found = allocate(allocator, "--granularity", "linear", correction, sparsity=0.9)
    targets = [
        linear["sparsity"]
        for block in found["blocks"]
        for linear in block["linears"].values()
    ]
    if correction == "--no-correction":  # else uniform may have been better
        assert len(set(targets)) > 3
    assert max(targets) <= 0.95


def test_arguments_of_the_allocator(allocate):
    def base(allocator: str, *options: object) -> list[float]:
        return column(allocate(allocator, "--no-correction", *options), "base_sparsity")

    def metric(allocator: str, *options: object) -> list[float]:
        return column(allocate(allocator, "--no-correction", *options), "metric")

    assert base("owl", "--set", "lmbda=0") == pytest.approx([0.6, 0.6])
    assert np.ptp(base("owl", "--set", "lmbda=0.1", "--set", "m=2")) > 0
    assert metric("owl", "--set", "m=2")[0] > metric("owl", "--set", "m=3")[0]
    mid = metric("alpha_pruning", "--set", "variant=mid")
    assert mid != metric("alpha_pruning", "--set", "variant=peak")


def test_allocate_for_people(model_dir, text_file):
    result = absorb(
        "allocate", model_dir, "--allocator", "atp", "--sparsity", 0.6, "--text",
        text_file, *SMALL, "--no-correction", "--set", "beta=0.02",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for part in (*BLOCKS, "0.5900", "0.6100", "9,216", "0.6000 of 0.6"):
        assert part in result.stdout


@pytest.mark.parametrize("allocator", ["uniform", "atp", "alpha_pruning"])
def test_weights_alone_need_no_text(model_dir, allocate, tmp_path, allocator):
    expected = allocate(allocator, "--no-correction")
    out = ["--ratios-out", tmp_path / "ratios.json", "--profile-cache", tmp_path]
    command = ["allocate", model_dir, "--allocator", allocator, "--sparsity", 0.6]
    done = absorb(*command, "--no-correction", *out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == expected
    ratios = json.loads((tmp_path / "ratios.json").read_text())
    assert ratios["data"] is None and "samples" not in ratios


@pytest.mark.parametrize(
    "options",
    [
        ["--allocator", "owl", "--no-correction"],
        ["--allocator", "lsa", "--no-correction"],
        ["--allocator", "uniform"],
    ],
)
def test_others_need_a_text(options):
    line = error_of("allocate", "./no-such-model", "--sparsity", 0.6, *options)
    assert "no text: give --text FILE" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--set": "lambda=0.1"}, "lambda=0.1 is no argument of it"),
        ({"--set": "lmbd=0.1"}, "did you mean 'lmbda'?"),
        ({"--set": "m=-1"}, "m=-1: input should be greater than 0"),
        ({"--set": "m"}, "--set 'm': write KEY=VALUE"),
        ({"--set": "=3"}, "--set '=3': write KEY=VALUE"),
        ({"--allocator": "owls"}, "--allocator 'owls' is unknown. Available: alpha_"),
        ({"--allocator": "atp", "--granularity": "linear"}, "no granularity 'linear'"),
        ({"--sparsity": 1.0}, "--sparsity 1.0 must be in [0, 1)"),
        (
            {"--sparsity": 0.97},
            "--sparsity 0.97 cannot be met, for no Linear is",
        ),
        ({"--samples": 1}, "--samples 1: the correction is judged on samples"),
        ({"--text": "missing.txt"}, "missing.txt: no such text file"),
        ({}, "no-such-model"),
    ],
)
def test_arguments_are_checked_before_the_model_is_loaded(text_file, change, message):
    options = {"--allocator": "owl", "--sparsity": 0.6, "--text": text_file, **change}
    flat = [item for option in options.items() for item in option]
    assert message in error_of("allocate", "./no-such-model", *flat, "--json")


def test_a_window_longer_than_the_model(model_dir, text_file):
    options = ["--allocator", "owl", "--sparsity", 0.6, "--seq-len", 65]
    line = error_of("allocate", model_dir, *options, "--text", text_file)
    assert "longer than the model's 64 positions" in line


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_ratios_for_others(model_dir, text_file, tmp_path, pruner):
    """llm-compressor alone makes of the recipe what was allocated."""
    recipe, ratios = tmp_path / "recipe.yaml", tmp_path / "ratios.json"
    result = absorb(
        "allocate", model_dir, "--allocator", "owl", "--sparsity", 0.6, "--text",
        text_file, *SMALL, "--json", "--pruner", pruner, "--granularity", "linear",
        "--no-correction", "--recipe-out", recipe, "--ratios-out", ratios,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = json.loads(ratios.read_text())
    assert saved["model"] == str(model_dir) and saved["data"] == str(text_file)
    assert saved["settings"]["allocator"] == "owl" and saved["pruner"] == pruner
    assert saved["achieved"] == pytest.approx(0.6, abs=1e-6)
    linears = saved["linears"]
    told = json.loads(result.stdout)["blocks"]
    assert list(linears.values()) == [
        linear["sparsity"] for block in told for linear in block["linears"].values()
    ]
    assert len(set(linears.values())) > 2

    assert "AbsorptionAllocation" not in recipe.read_text()
    out = tmp_path / "pruned"
    arguments = ["--recipe", recipe, "--text", text_file, *SMALL, "--out", out]
    pruned = absorb("prune", model_dir, *arguments)
    assert pruned.exit_code == 0, pruned.output
    model = AutoModelForCausalLM.from_pretrained(out)
    for name, sparsity in linears.items():
        weight = model.get_submodule(name).weight
        # a whole number of columns in every row
        assert float((weight == 0).float().mean()) == pytest.approx(sparsity, abs=0.03)


@pytest.mark.parametrize("option", ["--recipe-out", "--ratios-out"])
def test_files_that_cannot_be_written(text_file, tmp_path, option):
    line = error_of(
        "allocate", "./none", "--allocator", "owl", "--sparsity", 0.6, "--text",
        text_file, option, tmp_path / "no" / "file",
    )  # fmt: skip
    assert option in line and "is no directory" in line


@pytest.fixture
def files(model_dir, text_file, tmp_path):
    def run(*options: object):
        return [
            *("allocate", model_dir, "--allocator", "uniform", "--sparsity", 0.5),
            *("--no-correction", "--text", text_file, *SMALL, *options),
        ]

    return run


def test_files_of_the_user_are_not_overwritten(files, model_dir, text_file, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text('{"linears": {}}')
    for option in ("--recipe-out", "--ratios-out"):
        assert "no result of an earlier run" in error_of(*files(option, mine))
        for path in (model_dir / "config.json", text_file):
            assert "is only read" in error_of(*files(option, path))
    new = tmp_path / "new"
    line = error_of(*files("--recipe-out", new, "--ratios-out", tmp_path / "." / "new"))
    assert "are one file" in line
    assert mine.read_text() == '{"linears": {}}' and not new.exists()


def test_own_files_are_replaced(files, tmp_path):
    options = ["--recipe-out", tmp_path / "a.yaml", "--ratios-out", tmp_path / "b.json"]
    for _ in range(2):
        result = absorb(*files(*options))
        assert result.exit_code == 0, result.output


def test_the_result_is_shown_if_a_file_cannot_be_written(files, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("absorb_plugin.files.replace_file", full)
    result = absorb(*files("--ratios-out", tmp_path / "ratios.json", "--json"))
    assert result.exit_code == 1 and "No space left" in result.stderr
    assert json.loads(result.stdout)["achieved"] == 0.5
