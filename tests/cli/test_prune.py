"""`absorb prune`."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.cli import absorb, error_of, files_in
from safetensors.torch import load_file
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


def test_an_interrupt_when_the_model_is_saved(
    model_dir, text_file, wanda_recipe, tmp_path, monkeypatch
):  # fmt: skip
    def interrupt(model: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "absorb_plugin.evaluation.perplexity.linear_sparsity", interrupt
    )
    out = tmp_path / "pruned"
    result = absorb(
        "prune", model_dir, "--recipe", wanda_recipe, "--text", text_file, *SMALL,
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    assert last == f"interrupted: the model is complete, in {out}"
    assert AutoModelForCausalLM.from_pretrained(out)


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

    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "llama"}')
    (out / "notes.txt").write_text("mine")
    arguments[1] = model_dir
    assert "holds notes.txt" in error_of(*arguments, out, "--overwrite")
    (out / "notes.txt").rename(out / "tokenizer.json")
    result = absorb(*arguments, out, "--overwrite")
    assert result.exit_code == 0, result.output
    assert (out / "tokenizer.json").read_text() != "mine"
    assert "model.safetensors" in files_in(out)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, "no such recipe file"),
        ("a: [1", "cannot use recipe"),
        ("s_stage:\n  p_modifiers:\n    NoSuchModifier: {}\n", "NoSuchModifier"),
        (
            "s_stage:\n  p_modifiers:\n    WandaPruningModifier: {sparsty: 0.5}\n",
            "WandaPruningModifier: sparsity is required; sparsty=0.5: there is no such "
            "field, did you mean sparsity?",
        ),
        (
            "s_stage:\n  p_modifiers:\n"
            "    AbsorptionAllocationModifier: {alocator: owl, strength: 3}\n",
            "strength=3: input should be less than or equal to 1 or input should be "
            "'auto'; alocator='owl': there is no such field, did you mean allocator?",
        ),
        (
            "s_stage:\n  p_modifiers:\n"
            "    WandaPruningModifier: {sparsity: 0.5, targets: ['re:*x']}\n",
            "WandaPruningModifier: targets holds 're:*x', which is no regular",
        ),
        ("[1, 2]", "it holds no stages"),
        ("stage:\n  modifiers:\n    WandaPruningModifier: {}\n", "holds no modifier"),
        ("", "it is empty"),
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
        profile = json.loads((out / "report" / "profile.json").read_text())
        assert f"report_dir: {out}/report\n" in profile["recipe"]
        assert "partial" not in (out / "report" / "report.html").read_text()
        assert files_in(tmp_path) == {"pruned", "recipe.yaml"}
        assert not (out / "merges.txt").exists()
        (out / "merges.txt").write_text("of the run before")


def test_a_cache_inside_the_new_model_is_refused(model_dir, text_file, tmp_path):
    """It would go with the model that is replaced, and with a run that fails."""
    out = tmp_path / "out"
    options = ["--text", text_file, *SMALL, "--sparsity", 0.5, "--out", out]
    line = error_of("prune", model_dir, *options, "--profile-cache", out / "cache")
    assert (
        f"--profile-cache '{out / 'cache'}' lies in" in line
        and "name a directory beside it" in line
    )
    assert not out.exists()


def test_what_is_read_is_not_replaced(model_dir, text_file, wanda_recipe, tmp_path):
    out = Path(shutil.copytree(model_dir, tmp_path / "out"))
    recipe, text = shutil.copy(wanda_recipe, out), shutil.copy(text_file, out)
    options = ["prune", model_dir, *SMALL, "--out", out, "--overwrite"]
    line = error_of(*options, "--recipe", wanda_recipe, "--text", text)
    assert f"--text {text} lies in {out}" in line
    line = error_of(*options, "--recipe", recipe, "--text", text_file)
    assert f"--recipe {recipe} lies in {out}" in line
    assert {"wanda.yaml", "text.txt"} <= files_in(out)


# --- without a recipe file ---------------------------------------------------------


@pytest.fixture
def prune(model_dir, text_file, tmp_path):
    def run(*options: object, model=model_dir, out: str = "out"):
        return [
            *("prune", model, "--text", text_file, "--samples", 8, "--seq-len", 16),
            *("--out", tmp_path / out, *options),
        ]

    return run


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_a_sparsity_is_a_recipe(prune, tmp_path, pruner):
    options = ["--sparsity", 0.6, "--pruner", pruner, "--effort", "quick", "--json"]
    result = absorb(*prune(*options))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sparsity"] == pytest.approx(0.6, abs=0.03)
    made = (tmp_path / "out" / "absorb_recipe.yaml").read_text()
    assert made in result.stderr
    modifiers = yaml.safe_load(made)["prune_stage"]["prune_modifiers"]
    ours = modifiers.pop("AbsorptionAllocationModifier")
    assert ours == {"allocator": "owl", "effort": "quick"}
    (fields,) = modifiers.values()
    assert fields["sparsity"] == 0.6 and fields["ignore"] == ["re:.*lm_head"]
    # the recipe that was made makes the same model
    recipe = tmp_path / "out" / "absorb_recipe.yaml"
    again = absorb(*prune("--recipe", recipe, out="again"))
    assert again.exit_code == 0, again.output
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_linears_left_dense(prune, tmp_path):
    patterns = ["--ignore", "re:.*down_proj", "--ignore", "re:.*q_proj"]
    options = ["--sparsity", 0.5, "--pruner", "wanda", "--effort", "quick", *patterns]
    assert absorb(*prune(*options)).exit_code == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    zeros = {
        name.rpartition(".")[0].rpartition(".")[2]: bool((weight == 0).any())
        for name, weight in weights.items()
        if "proj" in name
    }
    dense = {"down_proj", "q_proj"}
    assert {name for name, any_zero in zeros.items() if not any_zero} == dense


def test_a_quality_is_a_recipe(prune, tmp_path):
    options = ["--max-loss-increase", 2.0, "--pruner", "wanda", "--effort", "quick"]
    result = absorb(*prune(*options))
    assert result.exit_code == 0, result.output
    made = yaml.safe_load((tmp_path / "out" / "absorb_recipe.yaml").read_text())
    modifiers = made["prune_stage"]["prune_modifiers"]
    assert modifiers["AbsorptionAllocationModifier"]["max_loss_increase"] == 2.0
    assert modifiers["WandaPruningModifier"]["sparsity"] == 0.9
    assert "was found. Pruning to it costs" in result.stdout
    assert "max_loss_increase is 2" in result.stdout


def test_what_a_quality_came_to(prune):
    options = ["--max-loss-increase", 2.0, "--pruner", "wanda", "--effort", "quick"]
    result = absorb(*prune(*options, "--json"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (quality,) = found["quality"]
    assert quality["max_loss_increase"] == 2.0
    assert quality["sparsity"] == pytest.approx(found["sparsity"], abs=0.03)
    assert quality["loss_increase"] + (quality["standard_error"] or 0) <= 2.0
    assert re.search(
        r"Sparsity 0\.\d+ costs .* ± .* nats per token; max_loss_increase is 2",
        result.stderr,
    )


def test_few_samples_tell_no_quality(prune, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model is not to be loaded")

    monkeypatch.setattr("absorb_plugin.evaluation.loading.load_for_pruning", refuse)
    options = ["--max-loss-increase", 2.0, "--effort", "quick", "--samples", 7]
    assert "--samples 7" in (said := error_of(*prune(*options)))
    assert "of fewer than 8 samples there are no two to judge by" in said


def test_copies_of_one_sample_tell_no_quality(prune, tmp_path):
    text = tmp_path / "copies.jsonl"
    text.write_text('{"text": "one and the same document of a few words"}\n' * 8)
    options = ["--max-loss-increase", 2.0, "--effort", "quick", "--samples", 8]
    said = error_of(*prune(*options, "--text", text, "--seq-len", 8))
    assert "but one sample to judge by" in said and "not the same" in said


@pytest.mark.parametrize("quantize", ["w8a8", "w4a16", "fp8"])
def test_quantised_after_pruning(prune, tmp_path, quantize):
    options = ["--sparsity", 0.5, "--pruner", "wanda", "--effort", "quick"]
    result = absorb(*prune(*options, "--quantize", quantize, "--json"))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sparsity"] == pytest.approx(0.5, abs=0.03)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["weights"]["num_bits"] == (4 if quantize == "w4a16" else 8)
    if quantize == "w4a16":  # the model is 32 and 64 columns wide
        assert group["weights"]["group_size"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give --sparsity, --max-loss-increase or --recipe"),
        (["--pruner", "wanda"], "Give --sparsity, --max-loss-increase or --recipe"),
        (["--sparsity", 1.0], "--sparsity 1.0 must be in [0, 1)"),
        (
            ["--sparsity", 0.97],
            "--sparsity 0.97 cannot be met, for no Linear is",
        ),
        (["--sparsity", 0.5, "--samples", 1], "--samples 1: the correction is judged"),
        (
            ["--max-loss-increase", 0],
            "error: --max-loss-increase 0.0: input should be greater than 0",
        ),
        (
            ["--max-loss-increase", "nan"],
            "error: --max-loss-increase nan: input should be a finite number",
        ),
        (["--sparsity", 0.5, "--allocator", "owls"], "--allocator 'owls' is unknown"),
    ],
)
def test_wishes_are_checked_first(prune, options, message):
    assert message in error_of(*prune(*options, model="./no-such-model"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--sparsity", 0.5),
        ("--max-loss-increase", 0.1),
        ("--pruner", "wanda"),
        ("--allocator", "owl"),
        ("--effort", "quick"),
        ("--quantize", "w8a8"),
    ],
)
def test_a_recipe_excludes_wishes(prune, wanda_recipe, option, value):
    line = error_of(*prune("--recipe", wanda_recipe, option, value, model="./none"))
    assert "--recipe" in line and f"{option} {value}" in line
    assert "give one of the two" in line


def test_an_allocator_of_a_recipe_is_checked_first(prune, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "s_stage:\n  p_modifiers:\n"
        "    AbsorptionAllocationModifier: {allocator: owls}\n"
        "    WandaPruningModifier: {sparsity: 0.5, targets: [Linear]}\n"
    )
    line = error_of(*prune("--recipe", path, model="./no-such-model"))
    assert "recipe.yaml: allocator='owls' is unknown" in line


def test_a_modifier_without_fields(prune, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("s_stage:\n  p_modifiers:\n    AbsorptionAllocationModifier:\n")
    line = error_of(*prune("--recipe", path))
    assert "write `AbsorptionAllocationModifier: {}`" in line


def test_a_recipe_is_the_file_that_was_named(prune, wanda_recipe, tmp_path):
    (tmp_path / "r1.yaml").write_text("another: file")
    (tmp_path / "r[1].yaml").write_bytes(b"\xef\xbb\xbf" + wanda_recipe.read_bytes())
    result = absorb(*prune("--recipe", tmp_path / "r[1].yaml"))
    assert result.exit_code == 0, result.output


# --- what is only read, and what could not be saved --------------------------------


def test_out_is_the_model(model_dir, text_file, wanda_recipe, tmp_path):
    arguments = ["--recipe", wanda_recipe, "--text", text_file, *SMALL, "--overwrite"]
    (tmp_path / "link").symlink_to(model_dir)
    before = (model_dir / "model.safetensors").read_bytes()
    for out in (model_dir, tmp_path / "link"):
        line = error_of("prune", model_dir, *arguments, "--out", out)
        assert "is the model itself, and that is only read" in line
    assert (model_dir / "model.safetensors").read_bytes() == before


def test_what_cannot_be_saved_is_refused_first(
    model_dir, text_file, wanda_recipe, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9}))
    arguments = ["--recipe", wanda_recipe, "--text", text_file, *SMALL]
    result = absorb("prune", folder, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "will not save generation_config.json" in result.stderr
    assert not (tmp_path / "out").exists()
