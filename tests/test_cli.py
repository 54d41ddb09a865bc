import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_fixtures import (  # noqa: F401  fixtures
    make_model,
    make_tokenizer,
    model_dir,
    text_file,
    wanda_recipe,
    words,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from absorb_plugin.cli import app
from absorb_plugin.evaluate import linear_sparsity, perplexity
from absorb_plugin.prune import staged_directory
from absorb_plugin.text import evaluation_windows

SMALL = ["--samples", "4", "--seq-len", "16"]


def absorb(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(*arguments: object) -> str:
    """Run a command that must fail with one clear line, and give that line back."""
    result = absorb(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


def files_in(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


@pytest.mark.parametrize("name", ["prune", "eval", "demo"])
def test_help(name):
    result = absorb(name, "--help")
    assert result.exit_code == 0
    assert "--json" in re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)


def test_eval_json_is_the_only_thing_on_stdout(model_dir, text_file):  # noqa: F811
    command = [sys.executable, "-m", "absorb_plugin.cli", "eval", str(model_dir)]
    options = ["--text", str(text_file), "--seq-len", "16", "--windows", "5", "--json"]
    environment = {**os.environ, "LLM_COMPRESSOR_LOG_LEVEL": "DEBUG"}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    windows = evaluation_windows([text_file.read_text()], tokenizer, 16, 5)
    assert all(window[0] == tokenizer.bos_token_id for window in windows)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    value, tokens = perplexity(model, windows, progress=False)
    assert result == {"perplexity": pytest.approx(value, rel=1e-6), "tokens": tokens}
    assert tokens == 5 * 15


def test_eval_for_people(model_dir, text_file):  # noqa: F811
    result = absorb("eval", model_dir, "--text", text_file, "--seq-len", 32)
    assert result.exit_code == 0, result.output
    windows = 400 // 31
    assert re.fullmatch(
        rf"Perplexity \d+\.\d+ over {windows * 31} tokens\n", result.stdout
    )


def test_eval_of_a_dataset(model_dir, tmp_path):  # noqa: F811
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": words(40)}) + "\n")
    result = absorb("eval", model_dir, "--dataset", tmp_path, "--seq-len", 16, "--json")
    assert json.loads(result.stdout)["tokens"] == 30


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_prune(model_dir, text_file, wanda_recipe, tmp_path, pipeline):  # noqa: F811
    out = tmp_path / "pruned"
    result = absorb(
        "prune", model_dir, "--recipe", wanda_recipe, "--text", text_file, *SMALL,
        "--pipeline", pipeline, "--out", out, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["out"] == str(out)
    assert told["sparsity"] == pytest.approx(0.5, abs=1e-6)
    assert (told["samples"], told["seq_len"]) == (4, 16)
    assert files_in(tmp_path) == {"pruned"}  # nothing staged is left
    assert {"config.json", "recipe.yaml", "tokenizer.json"} <= files_in(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert linear_sparsity(model) == pytest.approx(0.5, abs=1e-6)


def test_prune_is_deterministic_in_the_seed(
    model_dir, text_file, wanda_recipe, tmp_path  # noqa: F811
):  # fmt: skip
    def weights(name: str, seed: int) -> torch.Tensor:
        result = absorb(
            "prune", model_dir, "--recipe", wanda_recipe, "--text", text_file, *SMALL,
            "--seed", seed, "--dtype", "bfloat16", "--out", tmp_path / name,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"Saved to {tmp_path / name}: 0.5000 of")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.dtype == torch.bfloat16
        return model.model.layers[0].self_attn.q_proj.weight

    first = weights("a", 1)
    assert torch.equal(first, weights("b", 1))
    assert not torch.equal(first, weights("c", 2))


def test_prune_refuses_a_directory_in_use(
    model_dir, text_file, wanda_recipe, tmp_path  # noqa: F811
):  # fmt: skip
    (tmp_path / "notes.txt").write_text("mine")
    arguments = [
        "prune", "no-such-model", "--recipe", wanda_recipe, "--text", text_file, *SMALL,
        "--out",
    ]  # fmt: skip
    assert "is not empty" in error_of(*arguments, tmp_path)
    assert "no saved model" in error_of(*arguments, tmp_path, "--overwrite")
    assert "is a file" in error_of(*arguments, tmp_path / "notes.txt")
    assert files_in(tmp_path) == {"notes.txt"}

    (tmp_path / "config.json").write_text("{}")
    arguments[1] = model_dir
    result = absorb(*arguments, tmp_path, "--overwrite")
    assert result.exit_code == 0, result.output
    assert "notes.txt" not in files_in(tmp_path)
    assert "model.safetensors" in files_in(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, "no such recipe file"),
        ("a: [1", "cannot use recipe"),
        ("s_stage:\n  p_modifiers:\n    NoSuchModifier: {}\n", "NoSuchModifier"),
        (
            "s_stage:\n  p_modifiers:\n    WandaPruningModifier: {sparsty: 0.5}\n",
            "sparsty",
        ),
        ("stage:\n  modifiers:\n    WandaPruningModifier: {}\n", "holds no modifier"),
        ("", "cannot use recipe"),
    ],
)
def test_prune_checks_the_recipe_first(text_file, tmp_path, recipe, message):  # noqa: F811
    path = tmp_path / "recipe.yaml"
    if recipe is not None:
        path.write_text(recipe)
    line = error_of(
        "prune", "no-such-model", "--recipe", path, "--text", text_file, *SMALL,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "missing.txt"}, "missing.txt: no such text file"),
        ({"--seq-len": "65"}, "longer than the model's 64 positions"),
        ({"--windows": "1000"}, "the text is too short: 1000 windows of 16 tokens"),
        ({"--dataset": "wikitext"}, "not both"),
    ],
)
def test_eval_errors(model_dir, text_file, change, message):  # noqa: F811
    options = {"--text": text_file, "--seq-len": 16, **change}
    flat = [item for option in options.items() for item in option]
    assert message in error_of("eval", model_dir, *flat, "--json")


def test_no_such_model(text_file, tmp_path):  # noqa: F811
    missing = tmp_path / "model"
    line = error_of("eval", missing, "--text", text_file)
    assert line == f"error: {missing}: no such model directory"


def test_debug_shows_the_traceback(model_dir):  # noqa: F811
    result = absorb("eval", model_dir, "--text", "missing.txt", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_usage_errors_have_exit_code_2(model_dir, text_file):  # noqa: F811
    assert absorb("eval", model_dir, "--text", text_file, "--seq-len", 1).exit_code == 2
    assert absorb("prune", model_dir).exit_code == 2


def test_failed_run_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), staged_directory(out) as staging:
        (staging / "half").write_text("written")
        raise RuntimeError
    assert files_in(tmp_path) == set()


def test_finished_run_replaces_the_old_one(tmp_path):
    out = tmp_path / "sub" / "out"
    for content in ("old", "new"):
        with staged_directory(out) as staging:
            (staging / content).write_text("whole")
    assert files_in(tmp_path / "sub") == {"out"}
    assert files_in(out) == {"new"}


def test_tokenizer_without_bos(text_file, tmp_path):  # noqa: F811
    make_model().save_pretrained(tmp_path)
    make_tokenizer(bos=False).save_pretrained(tmp_path)
    result = absorb("eval", tmp_path, "--text", text_file, "--seq-len", 16, "--json")
    assert json.loads(result.stdout)["tokens"] == 400 // 16 * 15
