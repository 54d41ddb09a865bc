"""What is saved: a plain checkpoint whose recipe replays without the plugin."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import runs, tiny
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.recipe import Recipe
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.contract

REPLAY = """
import sys
folder, tests, *cases = sys.argv[1:]
sys.path.insert(0, tests)
import torch
torch.set_num_threads(1)
from helpers import tiny
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

for case in cases:
    assert "absorb_plugin" not in sys.modules
    set_seed(0)
    oneshot(
        # as tiny.make_model has it: the checkpoint does not say
        model=AutoModelForCausalLM.from_pretrained(
            f"{folder}/dense", attn_implementation="eager"
        ),
        tokenizer=AutoTokenizer.from_pretrained(f"{folder}/dense"),
        recipe=f"{folder}/{case}/recipe.yaml",
        dataset=tiny.make_dataset(6),
        num_calibration_samples=6,
        max_seq_length=16,
        output_dir=f"{folder}/{case}-again",
    )
    reset_session()
assert "absorb_plugin" not in sys.modules
"""

# kind of pruner, its fields, granularity
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "blocks": ("wanda", {"targets": ["LlamaDecoderLayer"]}, "block"),
    "ignore": ("sparsegpt", {"ignore": ["lm_head", "re:.*down_proj$"]}, "block"),
    "linears": ("wanda", {"targets": "LlamaDecoderLayer"}, "linear"),
}


def test_saved_recipes_replay_without_us(tmp_path: Path) -> None:
    dense = tiny.make_model("llama", num_hidden_layers=2)
    dense.save_pretrained(tmp_path / "dense")
    tiny.make_tokenizer(bos=False).save_pretrained(tmp_path / "dense")
    pruned = {}
    for case, (kind, fields, granularity) in CASES.items():
        model = tiny.make_model("llama", num_hidden_layers=2)
        recipe = [runs.absorption(granularity=granularity), runs.pruner(kind, **fields)]
        runs.run(model, recipe, tmp_path, output_dir=str(tmp_path / case))
        pruned[case] = tiny.snapshot(model)
        reset_session()

        text = (tmp_path / case / "recipe.yaml").read_text()
        assert "absorb" not in text.lower()
        (stage,) = yaml.safe_load(text).values()
        (modifiers,) = stage.values()
        name = runs.PRUNERS[kind].__name__
        assert list(modifiers) == [name]
        assert isinstance(modifiers[name]["sparsity"], list)

    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", REPLAY, str(tmp_path), tests, *CASES]
    subprocess.run(command, check=True)
    for case, state in pruned.items():
        for folder in (case, f"{case}-again"):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
            tiny.assert_same(tiny.snapshot(loaded), state)
        zeros = state["model.layers.0.mlp.up_proj.weight"] == 0
        assert 0.1 < zeros.float().mean() < 0.9


ATTENTION, MLP = ["re:.*self_attn.*_proj$"], ["re:.*mlp.*_proj$"]


@pytest.mark.parametrize("between", [True, False], ids=["between", "after"])
def test_twins_and_their_order_are_saved(between: bool, tmp_path: Path) -> None:
    first = runs.pruner(sparsity=0.3, targets=ATTENTION)
    second = runs.pruner(sparsity=0.6, targets=MLP)
    other = QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=["lm_head"])
    rest = [first, other, second] if between else [first, second, other]
    ours = runs.absorption(strength=0, allocator="uniform")
    model = tiny.make_model("llama", num_hidden_layers=2)
    runs.run(model, [ours, *rest], tmp_path, output_dir=str(tmp_path / "out"))
    saved = Recipe.create_instance(str(tmp_path / "out" / "recipe.yaml")).modifiers
    assert [type(one) for one in saved] == [type(one) for one in rest]
    for one, original in zip(saved, rest, strict=True):
        assert one.targets == original.targets
        if isinstance(one, WandaPruningModifier):
            assert one.sparsity == original.sparsity


def test_what_was_pruned_before_keeps_its_stage(tmp_path: Path) -> None:
    model = tiny.make_model("llama", num_hidden_layers=2)
    model, tokenizer = tiny.with_tokenizer(model, tmp_path / "config")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "dense")
    recipe = """
        prune_stage:
          prune_modifiers:
            AbsorptionAllocationModifier: {allocator: uniform, strength: 0}
            WandaPruningModifier: {sparsity: %s, targets: [Linear], ignore: [lm_head]}
    """
    for source, target, sparsity in (("dense", "one", 0.3), ("one", "two", 0.6)):
        oneshot(
            model=str(tmp_path / source),
            recipe=recipe % sparsity,
            dataset=tiny.make_dataset(6),
            num_calibration_samples=6,
            max_seq_length=16,
            output_dir=str(tmp_path / target),
        )
        reset_session()
    text = (tmp_path / "two" / "recipe.yaml").read_text()
    assert list(yaml.safe_load(text)) == ["prune_stage", "prune_2_stage"]
    saved = Recipe.create_instance(text).modifiers
    assert [max(one.sparsity) for one in saved] == pytest.approx([0.3, 0.6])
