"""`absorb prune`."""

import json

import pytest
import torch
from helpers.cli import absorb, error_of, files_in
from transformers import AutoModelForCausalLM

from absorb_plugin.evaluation.compare import read_runs
from absorb_plugin.evaluation.perplexity import linear_sparsity

SMALL = ["--samples", "4", "--seq-len", "16"]


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_prune(model_dir, text_file, wanda_recipe, tmp_path, pipeline):
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
    model_dir, text_file, wanda_recipe, tmp_path
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
    model_dir, text_file, wanda_recipe, tmp_path
):  # fmt: skip
    (tmp_path / "notes.txt").write_text("mine")
    arguments = [
        "prune", "no-such-model", "--recipe", wanda_recipe, "--text", text_file, *SMALL,
        "--out",
    ]  # fmt: skip
    assert "choose another, or --overwrite" in error_of(*arguments, tmp_path)
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
def test_prune_checks_the_recipe_first(text_file, tmp_path, recipe, message):
    path = tmp_path / "recipe.yaml"
    if recipe is not None:
        path.write_text(recipe)
    line = error_of(
        "prune", "no-such-model", "--recipe", path, "--text", text_file, *SMALL,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_report_inside_the_new_model_stays(
    model_dir, text_file, tmp_path
):  # fmt: skip
    """`absorb prune` replaces the whole directory; the recipe wrote into it."""
    out, recipe = tmp_path / "pruned", tmp_path / "recipe.yaml"
    recipe.write_text(
        "prune_stage:\n"
        "  prune_modifiers:\n"
        "    AbsorptionAllocationModifier:\n"
        "      allocator: uniform\n"
        "      strength: 0\n"
        f"      report_dir: {out}/report\n"
        "    WandaPruningModifier:\n"
        "      sparsity: 0.5\n"
        '      targets: ["Linear"]\n'
        '      ignore: ["re:.*lm_head"]\n'
    )
    arguments = ["--recipe", recipe, "--text", text_file, "--samples", 4]
    arguments += ["--seq-len", 16, "--out", out]
    for overwrite in ([], ["--overwrite"]):
        result = absorb("prune", model_dir, *arguments, *overwrite)
        assert result.exit_code == 0, result.output
        assert {"profile.json", "profile.png", "report.html"} == {
            path.name for path in (out / "report").iterdir()
        }
        assert (out / "config.json").is_file()
        (run,) = read_runs([out])
        assert (run.allocation, run.pruner) == ("uniform", "WandaPruningModifier")
        assert run.sparsity == pytest.approx(0.5, abs=0.02)
        assert not (out / "stale.txt").exists()
        (out / "stale.txt").write_text("of the run before")
