"""Every shipped recipe runs as it stands, with the real `oneshot`."""

from pathlib import Path

import pytest
import torch
from helpers import runs, tiny
from llmcompressor.core import reset_session
from llmcompressor.recipe import Recipe

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.blocks import find_blocks

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {"absorption_owl_wanda", "absorption_owl_sparsegpt"} <= {
        path.stem for path in RECIPES
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path, tmp_path: Path) -> None:
    ours, *others = Recipe.create_instance(str(path)).modifiers
    assert isinstance(ours, AbsorptionAllocationModifier)
    budget = next(o.sparsity for o in others if hasattr(o, "sparsity"))
    # groups of 128 columns have one scale in W4A16
    wide = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    model = tiny.make_model("llama", **(wide if "w4a16" in path.stem else {}))
    runs.run(model, str(path), tmp_path)
    weights = [linear.weight for linear in find_blocks(model).linears().values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    # rounded down in every row of 32 or 48 columns
    total = sum(weight.numel() for weight in weights)
    assert zeros / total == pytest.approx(budget, abs=1 / 32)
    assert not (model.lm_head.weight == 0).any()
    with torch.no_grad():
        assert torch.isfinite(model(**tiny.make_batch()).logits).all()


def test_yaml_and_objects_are_one(tmp_path: Path) -> None:
    text = """
test_stage:
  test_modifiers:
    AbsorptionAllocationModifier:
      signal: noise
      strength: 0.2
      signal_args: {samples: 2}
      max_sparsity: 0.9
    WandaPruningModifier:
      sparsity: 0.5
      targets: ["Linear"]
      ignore: ["re:.*lm_head"]
"""
    recipe = [
        runs.absorption(signal="noise", signal_args={"samples": 2}),
        runs.pruner(),
    ]
    states = []
    for given in (text, recipe):
        model = tiny.make_model("llama", num_hidden_layers=2)
        runs.run(model, given, tmp_path)
        states.append(tiny.snapshot(model))
        reset_session()
    tiny.assert_same(*states)
    assert (states[0]["model.layers.0.mlp.up_proj.weight"] == 0).any()
