"""Recipes that are made from a few wishes."""

from pathlib import Path

import pytest
import torch
import yaml
from compressed_tensors.utils import match_named_modules
from helpers import tiny
from transformers import PreTrainedModel

from absorb_plugin.evaluation.loading import empty_model
from absorb_plugin.evaluation.recipes import RecipeWishes

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*_owl_sparsegpt_*.yaml"))


def quantize_fields(text: str) -> dict:
    groups = yaml.safe_load(text)["prune_stage"]
    return groups["quantize_modifiers"]["QuantizationModifier"]


def quantized(model: PreTrainedModel, fields: dict) -> set[str]:
    found = match_named_modules(model, ["Linear"], fields["ignore"])
    return {name for name, _ in found}


def linears(model: PreTrainedModel) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@pytest.mark.parametrize("recipe", ["made", *SHIPPED])
def test_images_are_not_quantised(recipe: str | Path) -> None:
    model = tiny.with_images("gemma3")
    made = RecipeWishes(sparsity=0.5, quantize="w8a8").text
    fields = quantize_fields(made(model) if recipe == "made" else recipe.read_text())
    expected = {name for name in linears(model) if "language_model" in name}
    assert len(expected) == 14 and quantized(model, fields) == expected
    if recipe == "made":
        assert fields["ignore"] == [r"re:model\.vision_tower\.", "lm_head"]


@pytest.mark.parametrize("recipe", ["made", *SHIPPED])
@pytest.mark.parametrize("architecture", ["qwen2_moe", "phimoe", "jamba", "llama"])
def test_what_chooses_among_experts_is_not_quantised(
    architecture: str, recipe: str | Path
) -> None:
    model = tiny.make_model(architecture)
    made = RecipeWishes(sparsity=0.5, quantize="fp8").text
    fields = quantize_fields(made(model) if recipe == "made" else recipe.read_text())
    gates = {x for x in linears(model) if x.endswith(("shared_expert_gate", "router"))}
    assert bool(gates) == (architecture != "llama")
    assert quantized(model, fields) == linears(model) - gates - {"lm_head"}
    if recipe == "made":
        assert len(fields["ignore"]) == 1 + bool(gates)


@pytest.mark.parametrize("architecture", ["phimoe", "jamba", "qwen3_moe"])
def test_experts_that_are_no_linears_yet_are_quantised(architecture: str) -> None:
    model = tiny.make_model(architecture)  # linearised
    fused = empty_model(model.config)
    assert len(linears(fused)) < len(linears(model))
    text = RecipeWishes(sparsity=0.5, quantize="w8a8").text
    assert quantize_fields(text(fused)) == quantize_fields(text(model))
    experts = {name for name in linears(model) if ".experts." in name}
    assert experts and experts <= quantized(model, quantize_fields(text(fused)))


def test_groups_fit_experts_that_are_no_linears_yet() -> None:
    sizes = {"moe_intermediate_size": 96, "hidden_size": 128}
    fused = empty_model(tiny.make_model("qwen3_moe", **sizes).config)
    fields = quantize_fields(RecipeWishes(sparsity=0.5, quantize="w4a16").text(fused))
    assert fields["config_groups"]["group_0"]["weights"]["group_size"] == 32


def test_groups_fit_what_is_quantised() -> None:
    wishes = RecipeWishes(sparsity=0.5, quantize="w4a16")
    fields = quantize_fields(wishes.text(tiny.with_images("gemma3", vision_width=40)))
    assert fields["config_groups"]["group_0"]["weights"]["group_size"] == 32
    with pytest.raises(ValueError, match="down_proj has 40 columns, which groups of"):
        wishes.text(tiny.make_model("llama", intermediate_size=40))


def test_a_gate_of_one_block_is_a_plain_linear_of_another() -> None:
    model = tiny.make_model("qwen2_moe")
    odd = torch.nn.Linear(32, 32)
    model.model.layers[1].mlp.shared_expert_gate = odd
    fields = quantize_fields(RecipeWishes(sparsity=0.5, quantize="w8a8").text(model))
    found = quantized(model, fields)
    assert "model.layers.1.mlp.shared_expert_gate" in found
    assert "model.layers.0.mlp.shared_expert_gate" not in found
