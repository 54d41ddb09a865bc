"""Pruning and quantisation in one recipe: what is zero stays zero."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import runs, tiny
from llmcompressor.core import State, reset_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.quip import QuIPModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from llmcompressor.recipe import Recipe
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from absorb_plugin.blocks import find_blocks
from absorb_plugin.cli.app import app
from absorb_plugin.evaluation.loading import load_for_pruning
from absorb_plugin.evaluation.perplexity import linear_sparsity

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
Masks = dict[str, torch.Tensor]


def shipped(name: str) -> list[Modifier]:
    """The quantiser of a shipped recipe."""
    path = RECIPES / f"absorption_owl_sparsegpt_{name}.yaml"
    return [Recipe.create_instance(str(path)).modifiers[-1]]


def documented() -> list[Modifier]:
    """The quantiser that docs/deploy.md shows for groups of 64 columns."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    lines = text.split("```yaml\n")[1].split("```")[0]
    return list(Recipe.create_instance(f"quantize_stage:\n{lines}").modifiers)


def make_model() -> PreTrainedModel:
    """Wide enough for groups of 128 columns."""
    return tiny.make_model(
        "llama", hidden_size=128, intermediate_size=128, num_hidden_layers=2
    )


def zeros_of(model: PreTrainedModel, names: Masks | None = None) -> Masks:
    """
    :param names: Linears to look at; by default those of the blocks
    """
    linears = {name: model.get_submodule(name) for name in names or {}}
    linears = linears or find_blocks(model).linears()
    return {name: linear.weight.detach() == 0 for name, linear in linears.items()}


def lost(before: Masks, after: Masks) -> float:
    """Share of the pruned weights that are not zero any more."""
    count = sum(int((before[name] & ~after[name]).sum()) for name in before)
    return count / sum(int(mask.sum()) for mask in before.values())


def share(zeros: Masks) -> float:
    return float(torch.cat([mask.flatten() for mask in zeros.values()]).float().mean())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Masks:
    """What the pruner makes zero when nothing stands after it."""
    model = make_model()
    recipe = [runs.absorption(), runs.pruner("sparsegpt")]
    runs.run(model, recipe, tmp_path_factory.mktemp("pruned"))
    reset_session()
    return zeros_of(model)


def asymmetric() -> list[Modifier]:
    return [runs.quantizer("W4A16_ASYM")]


CASES: dict[str, tuple[Callable[[], list[Modifier]], str, str]] = {
    "w8a8": (lambda: shipped("w8a8"), "int-quantized", "independent"),
    "w4a16": (lambda: shipped("w4a16"), "pack-quantized", "independent"),
    "fp8": (lambda: shipped("fp8"), "float-quantized", "independent"),
    "groups of 64": (documented, "pack-quantized", "independent"),
    "one pass": (asymmetric, "pack-quantized", "sequential"),
}


@pytest.mark.parametrize("case", CASES)
def test_zeros_survive(case: str, pruned: Masks, tmp_path: Path) -> None:
    modifiers, layout, pipeline = CASES[case]
    model, out = make_model(), tmp_path / "out"
    ours = runs.absorption(report_dir=str(tmp_path))
    recipe = [ours, runs.pruner("sparsegpt"), *modifiers()]
    runs.run(model, recipe, tmp_path, pipeline=pipeline, output_dir=str(out))

    saved = json.loads((out / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "compressed-tensors"
    assert saved["format"] == layout
    (stage,) = yaml.safe_load((out / "recipe.yaml").read_text()).values()
    assert [name for group in stage.values() for name in group] == [
        "SparseGPTModifier",
        "QuantizationModifier",
    ]

    stored = linear_sparsity(model)  # compressed in memory, as it was saved
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        expected = model(**tiny.make_batch()).logits
        logits = reloaded(**tiny.make_batch()).logits
    if case == "w8a8":
        # An int8 activation near a rounding boundary may go either way, and what comes
        # after it differs; how many do depends on the CPU. Most tokens see none.
        differences = (logits - expected).abs().amax(dim=-1)
        assert differences.median() < 1e-4
        assert (logits - expected).abs().mean() < 1e-2 * expected.std()
    else:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    zeros = zeros_of(reloaded, pruned)
    assert lost(pruned, zeros) == 0
    assert stored == pytest.approx(share(zeros))
    assert stored < 0.9  # some are left

    # the report is about the pruner, rounding to zero not counted
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["realised"] == pytest.approx(share(pruned))


AFTER: dict[str, tuple[Callable[[], list[Modifier]], bool]] = {
    "QuantizationModifier": (lambda: [runs.quantizer("W4A16")], False),
    "SmoothQuantModifier": (
        lambda: [SmoothQuantModifier(smoothing_strength=0.5), runs.quantizer("W8A8")],
        False,
    ),
    "AWQModifier": (lambda: [AWQModifier(), runs.quantizer("W4A16")], False),
    "GPTQModifier": (
        lambda: [GPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W4A16")],
        True,
    ),
    "QuIPModifier": (
        lambda: [QuIPModifier(rotations=["v", "u"], transform_type="hadamard")],
        True,
    ),
    "SpinQuantModifier": (lambda: [SpinQuantModifier(rotations=["R1"])], True),
}


@pytest.mark.parametrize("name", AFTER)
def test_what_destroys_zeros_is_warned_of(
    name: str,
    pruned: Masks,
    warnings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # AWQModifier pins its cache, which torch refuses where there is no accelerator
    if not torch.accelerator.is_available():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    modifiers, destroys = AFTER[name]
    model = make_model()
    recipe = [runs.absorption(), runs.pruner("sparsegpt"), *modifiers()]
    runs.run(model, recipe, tmp_path)
    assert (lost(pruned, zeros_of(model, pruned)) > 0.001) == destroys
    told = [message for message in warnings if "stands after" in message]
    assert len(told) == destroys
    assert all(message.startswith(f"{name} stands after") for message in told)


@pytest.mark.parametrize("stands", ["before", "between"])
@pytest.mark.parametrize("written", ["default", "written out"])
def test_smoothquant_beside_us(
    stands: str, written: str, warnings: list[str], logs: list[str], tmp_path: Path
) -> None:
    """What it has worked out by then are modules, which no recipe can hold."""
    mappings = [[["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]]
    fields = {"mappings": mappings} if written != "default" else {}
    smooth = SmoothQuantModifier(smoothing_strength=0.5, **fields)
    ours, pruner = runs.absorption(report_dir=str(tmp_path / "report")), runs.pruner()
    order = [smooth, ours, pruner] if stands == "before" else [ours, smooth, pruner]
    model = make_model()
    runs.run(model, order, tmp_path, output_dir=str(tmp_path / "out"))
    assert share(zeros_of(model)) == pytest.approx(0.5, abs=0.01)
    profile = json.loads((tmp_path / "report" / "profile.json").read_text())
    (groups,) = yaml.safe_load(profile["recipe"]).values()
    (kept,) = [g["SmoothQuantModifier"] for g in groups.values() if len(g) == 3]
    assert kept["smoothing_strength"] == 0.5 and "resolved_mappings_" not in kept
    # as llm-compressor writes the default mappings, it cannot read them
    unreadable = [line for line in warnings if "does not load again" in line]
    replays = [line for line in logs if "replays without" in line]
    assert len(unreadable) == (written == "default")
    assert len(replays) == (written != "default")
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    if written == "default":
        with pytest.raises(yaml.YAMLError):
            yaml.safe_load(recipe)
    else:
        yaml.safe_load(recipe)


@pytest.mark.contract
def test_a_rotation_before_us_replays(tmp_path: Path) -> None:
    """llm-compressor saves what it has worked out of it, with which it does not run."""
    rotate = SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")
    model, out = tiny.make_model("llama", num_hidden_layers=2), tmp_path / "out"
    recipe = [rotate, runs.absorption(), runs.pruner()]
    pruned = runs.run(model, recipe, tmp_path, output_dir=str(out))
    reset_session()
    again = tiny.make_model("llama", num_hidden_layers=2)
    runs.run(again, str(out / "recipe.yaml"), tmp_path)
    tiny.assert_same(again.state_dict(), pruned.state_dict())


def bounded(recipe: list[Modifier], directory: Path, bound: float = 9.0) -> dict:
    """`quality` of the profile."""
    ours = runs.absorption(max_loss_increase=bound, strength="auto", effort="quick")
    dataset = tiny.make_dataset(16)
    runs.run(make_model(), [ours, *recipe], directory, dataset=dataset, samples=16)
    (profile,) = ours.profiles()
    return profile["quality"]


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "FP8"])
@pytest.mark.parametrize("kind", runs.PRUNERS)
def test_a_bound_on_the_loss_is_of_what_is_quantised(
    kind: str, scheme: str, tmp_path: Path, warnings: list[str]
) -> None:
    pruner = runs.pruner(kind, sparsity=0.3)
    plain = bounded([pruner], tmp_path)
    reset_session()
    pruner = runs.pruner(kind, sparsity=0.3)
    quantised = bounded([pruner, runs.quantizer(scheme)], tmp_path)
    assert plain["quantization"] is None
    assert quantised["quantization"]["modifiers"] == ["QuantizationModifier"]
    assert not [line for line in warnings if "max_loss_increase" in line]
    # the same allocation, of the largest budget, judged without and with
    one, other = plain["curve"][-1], quantised["curve"][-1]
    assert one["sparsity"] == other["sparsity"] == pytest.approx(0.3)
    assert abs(other["loss_increase"] - one["loss_increase"]) > 1e-4
    assert abs(quantised["quantization"]["loss_increase"]) > 1e-4


def test_a_bound_below_what_quantising_costs(tmp_path: Path) -> None:
    told = (
        "max_loss_increase=1e-07 cannot be kept: the quantisation by "
        "QuantizationModifier alone costs .* quantise to more bits"
    )
    recipe = [runs.pruner(), runs.quantizer("W4A16")]
    with pytest.raises(ValueError, match=told):
        bounded(recipe, tmp_path, 1e-7)
    reset_session()
    gptq = GPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W4A16")
    told = "GPTQModifier alone costs .* give GPTQModifier, which may cost less .* own"
    with pytest.raises(ValueError, match=told):
        bounded([runs.pruner(), gptq], tmp_path, 1e-7)


def test_a_bound_is_not_of_all_that_is_quantised(
    tmp_path: Path, warnings: list[str], logs: list[str]
) -> None:
    gptq = GPTQModifier(targets=["Linear"], scheme="W8A16")
    assert bounded([runs.pruner(), gptq], tmp_path)["quantization"] is not None
    (told,) = [line for line in warnings if "max_loss_increase" in line]
    assert "GPTQModifier quantises lm_head, which nobody judges here" in told
    assert any("GPTQModifier chooses them with more care" in line for line in logs)
    reset_session()
    smooth = SmoothQuantModifier(smoothing_strength=0.5)
    found = bounded([runs.pruner(), smooth, runs.quantizer("W8A8")], tmp_path)
    names = ["SmoothQuantModifier", "QuantizationModifier"]
    assert found["quantization"]["modifiers"] == names
    assert any("SmoothQuantModifier chooses them" in line for line in logs)


def test_a_bound_knows_nothing_of_what_was_quantised_before(
    tmp_path: Path, warnings: list[str]
) -> None:
    """The quantiser's place is after the pruner; here it is between us and that."""
    found = bounded([runs.quantizer("W8A8"), runs.pruner()], tmp_path)
    assert found["quantization"] is None
    (told,) = [line for line in warnings if "max_loss_increase" in line]
    assert "stands before the pruning modifier" in told


@pytest.mark.parametrize("quantised", [True, False])
def test_a_model_that_came_with_stages_that_quantise(
    quantised: bool, tmp_path: Path, warnings: list[str], logs: list[str]
) -> None:
    """Replayed with this run's, on what it was made of, they end elsewhere."""
    folders = [tmp_path / "once", tmp_path / "twice"]
    model: PreTrainedModel = make_model()
    for out, sparsity in zip(folders, (0.3, 0.5), strict=True):
        reset_session()
        recipe = [runs.absorption(), runs.pruner(sparsity=sparsity)]
        recipe += [runs.quantizer("W8A16")] * quantised
        runs.run(model, recipe, tmp_path, output_dir=str(out))
        model = load_for_pruning(str(out), "auto")
    told = [line for line in warnings if "stages that the model came with" in line]
    assert len(told) == quantised
    assert len([x for x in logs if "replays without" in x]) == 2 - quantised


@pytest.mark.parametrize("again", [True, False])
def test_a_model_that_is_quantised_already(
    again: bool, tmp_path: Path, warnings: list[str]
) -> None:
    """Unless it is quantised anew, it is saved as it was, and nothing judges that."""
    out = str(tmp_path / "out")
    runs.run(make_model(), [runs.quantizer("W8A16")], tmp_path, output_dir=out)
    reset_session()
    recipe = [runs.absorption(), runs.pruner(), *[runs.quantizer("W8A16")] * again]
    pruned = runs.run(load_for_pruning(out, "auto"), recipe, tmp_path)
    told = [x for x in warnings if "14 Linears of the model are quantised" in x]
    assert len(told) == (not again)
    assert linear_sparsity(pruned) == pytest.approx(0.5, abs=0.01)


class Locked(Modifier):
    """Of somebody else, with a field that no YAML can hold."""

    lock: Any = None

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self.lock = threading.Lock()
        return True


def test_a_recipe_that_cannot_be_written_does_not_cost_the_run(
    tmp_path: Path, warnings: list[str]
) -> None:
    model = make_model()
    runs.run(model, [runs.absorption(), runs.pruner(), Locked()], tmp_path)
    assert share(zeros_of(model)) == pytest.approx(0.5, abs=0.01)
    (told,) = [line for line in warnings if "does not load again" in line]
    assert "TypeError" in told


def test_no_warning_where_gptq_stands_before(
    warnings: list[str], tmp_path: Path
) -> None:
    gptq = GPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A16")
    model = make_model()
    runs.run(model, [gptq, runs.absorption(), runs.pruner()], tmp_path)
    assert not [message for message in warnings if "stands after" in message]


def test_absorb_prune(text_file: Path, tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    make_model().save_pretrained(dense)
    tiny.make_tokenizer(bos=False).save_pretrained(dense)
    recipe = RECIPES / "absorption_owl_sparsegpt_w4a16.yaml"
    small = ["--text", str(text_file), "--seq-len", "16"]
    command = ["prune", str(dense), "--recipe", str(recipe), "--out", str(out)]
    done = CliRunner().invoke(app, [*command, *small, "--samples", "6", "--json"])
    assert done.exit_code == 0, done.output
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    share = json.loads(done.stdout)["sparsity"]
    assert share == pytest.approx(linear_sparsity(reloaded))
    assert share >= 0.599
    done = CliRunner().invoke(app, ["eval", str(out), *small])
    assert done.exit_code == 0, done.output
