"""A saved mixture holds its experts by names that transformers reads."""

import copy
import gc
import weakref
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from compressed_tensors.offload import offload_module
from compressed_tensors.offload.module import remove_module_offload
from helpers import runs, tiny
from llmcompressor.core import reset_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    PreTrainedModel,
)

from absorb_plugin._llmcompressor import LINEAR_EXPERTS, linear_experts, linearize_moe
from absorb_plugin.evaluation.check import check_checkpoint
from absorb_plugin.evaluation.oneshot import prune
from absorb_plugin.evaluation.perplexity import linear_sparsity
from absorb_plugin.pruners.experts import check_packing, name_as_stored, packed_experts

PACKS = pytest.mark.skipif(
    not hasattr(LINEAR_EXPERTS[0] if LINEAR_EXPERTS else None, "to_experts_module"),
    reason="llm-compressor is older than 0.14",
)
FUSES = pytest.mark.skipif(
    not LINEAR_EXPERTS, reason="transformers 4 has experts of Linears"
)
BY_EXPERT = ["mixtral", "phimoe", "minimax", "qwen3_moe", "jamba"]
MINIMAX = {"head_dim": 8, "block_size": 4, "num_local_experts": 4}


def made(name: str) -> PreTrainedModel:
    if name != "minimax":
        return tiny.make_model(name)
    kind = ("MiniMaxForCausalLM", MINIMAX | {"intermediate_size": 16})
    with patch.dict(tiny.MORE_ARCHITECTURES, minimax=kind):
        return tiny.make_model(name)


def recipe(sparsity: float = 0.5) -> list[Modifier]:
    ours = runs.absorption(allocator="uniform", strength=0)
    return [ours, runs.pruner(sparsity=sparsity)]


def names_in(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def expect_the_same(model: PreTrainedModel, folder: Path) -> None:
    """What is loaded lacks nothing, and computes what the pruned model does."""
    again, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = tiny.make_batch(2)
    with torch.no_grad():
        one, other = model.eval()(**batch).logits, again.eval()(**batch).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.contract
@pytest.mark.parametrize("loaded", [False, pytest.param(True, marks=PACKS)])
@pytest.mark.parametrize("name", BY_EXPERT)
def test_experts_have_the_names_of_their_checkpoints(
    name: str, loaded: bool, tmp_path: Path
) -> None:
    model, out = made(name), tmp_path / "out"
    if loaded:  # transformers keeps then what it changed on the way
        with packed_experts(model):
            model.save_pretrained(tmp_path / "dense")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", attn_implementation="eager"
        )
    pruned = runs.run(model, recipe(), tmp_path, output_dir=str(out))
    reset_session()
    expect_the_same(pruned, out)
    report = check_checkpoint(out)
    assert not report.problems and report.planned == pytest.approx(0.5)


@FUSES
@pytest.mark.contract
def test_without_us_they_are_lost(tmp_path: Path) -> None:
    """Where this fails, llm-compressor has learnt it, and `name_as_stored` can go."""
    out = tmp_path / "out"
    runs.run(made("mixtral"), [runs.pruner()], tmp_path, output_dir=str(out))
    reset_session()
    (problem,) = check_checkpoint(out).problems
    assert "experts" in problem and "random numbers" in problem


@pytest.mark.contract
def test_quantised_experts_have_them_too(tmp_path: Path) -> None:
    kind = {"targets": ["Linear"], "ignore": ["lm_head", "re:.*gate$"]}
    quantizer = QuantizationModifier(**kind, scheme="FP8_DYNAMIC")
    out = tmp_path / "out"
    runs.run(made("mixtral"), [*recipe(), quantizer], tmp_path, output_dir=str(out))
    reset_session()
    of_experts = [name for name in names_in(out) if ".experts." in name]
    parts = {name.split(".")[-2] for name in of_experts}
    assert parts == {"w1", "w2", "w3"}
    assert any(name.endswith("w2.weight_scale") for name in of_experts)


@PACKS
@pytest.mark.contract
def test_experts_of_one_tensor_are_packed_again(
    tmp_path: Path, warnings: list[str]
) -> None:
    model, out = made("granitemoe"), tmp_path / "out"
    model, tokenizer = tiny.with_tokenizer(model, tmp_path / "config")
    pruned = prune(model, tokenizer, recipe(), tiny.make_dataset(6), output_dir=out)
    reset_session()
    assert linear_sparsity(pruned) == pytest.approx(0.5, abs=0.01)  # of Linears again
    expect_the_same(pruned, out)
    report = check_checkpoint(out)
    assert not report.problems and report.planned == pytest.approx(0.5)
    assert report.zeros == pytest.approx(0.5, abs=0.01)
    assert not [line for line in warnings if "in one tensor" in line]
    assert (out / "recipe.yaml").is_file() and (out / "tokenizer.json").is_file()


@pytest.mark.contract
@pytest.mark.parametrize("name", ["mixtral", pytest.param("granitemoe", marks=PACKS)])
def test_prune_does_so_without_our_modifier_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "linearize_moe", None)  # as a model is loaded
    model, tokenizer = tiny.with_tokenizer(made(name), tmp_path / "config")
    data, out = tiny.make_dataset(6), tmp_path / "out"
    pruned = prune(model, tokenizer, [runs.pruner()], data, output_dir=out)
    expect_the_same(pruned, out)
    assert not check_checkpoint(out).problems


@PACKS
@pytest.mark.contract
def test_experts_with_gate_and_up_in_turn_are_packed_so(tmp_path: Path) -> None:
    model = tiny.gpt_oss()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_packing(model)
    linearize_moe(model)
    with packed_experts(model):
        tiny.assert_same(model.state_dict(), before)
    out = tmp_path / "out"
    model, tokenizer = tiny.with_tokenizer(model, tmp_path / "config")
    pruned = prune(model, tokenizer, recipe(), tiny.make_dataset(6), output_dir=out)
    reset_session()
    expect_the_same(pruned, out)


def packing(name: str) -> PreTrainedModel:
    return tiny.gpt_oss() if name == "gpt_oss" else made(name)


@PACKS
@pytest.mark.contract
@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss"])
def test_whoever_saves_has_them_packed(
    name: str, tmp_path: Path, warnings: list[str]
) -> None:
    model, out = packing(name), tmp_path / "out"
    runs.run(model, recipe(), tmp_path, output_dir=str(out))
    reset_session()
    assert linear_sparsity(model) == pytest.approx(0.5, abs=0.01)  # of Linears again
    expect_the_same(model, out)
    report = check_checkpoint(out)
    assert not report.problems and report.planned == pytest.approx(0.5)
    assert (out / "recipe.yaml").is_file() and (out / "tokenizer.json").is_file()
    assert not [line for line in warnings if "in one tensor" in line]


@PACKS
@pytest.mark.contract
@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss"])
def test_a_model_can_be_saved_and_pruned_again(name: str, tmp_path: Path) -> None:
    model = packing(name)
    runs.run(model, recipe(), tmp_path)
    before, tensors = tiny.snapshot(model), dict(model.named_parameters())
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        tiny.assert_same(tiny.snapshot(model), before)
        again = dict(model.named_parameters())
        assert all(tensors[name] is again[name] for name in tensors)  # of an optimizer
        expect_the_same(model, tmp_path / str(number))
    more = recipe(sparsity=0.7)
    runs.run(model, more, tmp_path, output_dir=str(tmp_path / "more"))
    assert linear_sparsity(model) == pytest.approx(0.7, abs=0.02)
    expect_the_same(model, tmp_path / "more")


@PACKS
def test_a_copy_saves_its_own_weights_and_nothing_keeps_the_model(
    tmp_path: Path,
) -> None:
    model = made("granitemoe")
    runs.run(model, recipe(), tmp_path)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    copied.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "model")
    expect_the_same(copied, tmp_path / "copy")
    expect_the_same(model, tmp_path / "model")
    there = weakref.ref(copied)
    del copied, parameter
    gc.collect()
    assert there() is None


@PACKS
def test_what_saved_the_model_before_is_asked_to(tmp_path: Path) -> None:
    model, folders = made("granitemoe"), []

    def save(self: PreTrainedModel, folder: str, **fields: Any) -> None:
        folders.append(folder)
        type(self).save_pretrained(self, folder, **fields)

    model.save_pretrained = MethodType(save, model)
    out = str(tmp_path / "out")
    runs.run(model, recipe(), tmp_path, output_dir=out)
    assert folders == [out]
    expect_the_same(model, tmp_path / "out")


@pytest.mark.contract
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_nobody_else_is_saved_otherwise(name: str, tmp_path: Path) -> None:
    model = made(name)
    runs.run(model, recipe(), tmp_path)
    assert isinstance(model.save_pretrained, FunctionType)  # llm-compressor's


@PACKS
def test_saving_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = made("granitemoe")
    runs.run(model, recipe(), tmp_path)
    before = tiny.snapshot(model)
    with (
        patch("transformers.modeling_utils.safe_save_file", side_effect=OSError),
        pytest.raises(OSError),
    ):
        model.save_pretrained(tmp_path / "out")
    # nor is it left as llm-compressor hands it to accelerate, which a GPU would need
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    tiny.assert_same(tiny.snapshot(model), before)
    model.save_pretrained(tmp_path / "out")
    expect_the_same(model, tmp_path / "out")


@PACKS
@pytest.mark.parametrize("shared", [False, True])
def test_experts_are_not_held_twice_while_they_are_saved(shared: bool) -> None:
    model = made("granitemoe")
    before, linear = tiny.snapshot(model), list(linear_experts(model).values())
    weights = [x for one in linear for x in one.parameters()]
    if shared:  # other processes have them still
        weights = [x.share_memory_() for x in weights]
    with packed_experts(model):
        held = [x.untyped_storage().nbytes() == x.nbytes for x in weights]
    assert held == [shared] * len(weights)
    tiny.assert_same(tiny.snapshot(model), before)


@PACKS
@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss"])
def test_experts_on_disk_are_packed(name: str, tmp_path: Path) -> None:
    model = packing(name)
    linearize_moe(model)
    before = tiny.snapshot(model)
    experts = linear_experts(model).values()
    for one in [module for each in experts for module in each.modules()]:
        remove_module_offload(one)
        offload_module(one, "cpu", "disk", offload_dir=str(tmp_path))
    name_as_stored(model)
    model.save_pretrained(tmp_path / "out")
    tiny.assert_same(tiny.snapshot(model), before)
    expect_the_same(model, tmp_path / "out")


@PACKS
@pytest.mark.contract
def test_quantised_experts_are_left_as_they_are(
    tmp_path: Path, warnings: list[str]
) -> None:
    kind = {"targets": ["Linear"], "ignore": ["lm_head", "re:.*router.*"]}
    quantizer = QuantizationModifier(**kind, scheme="FP8_DYNAMIC")
    out = tmp_path / "out"
    runs.run(made("granitemoe"), [*recipe(), quantizer], tmp_path, output_dir=str(out))
    assert any(name.endswith("experts.0.down_proj.weight") for name in names_in(out))
    (told,) = [line for line in warnings if "random numbers" in line]
    assert "GraniteMoeForCausalLM" in told and "quantised" in told


@PACKS
@pytest.mark.contract
def test_experts_that_cannot_be_packed_are_refused_before_minutes_are_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("absorb_plugin.pruners.experts._in_turn", lambda x, dim: x)
    model, tokenizer = tiny.with_tokenizer(tiny.gpt_oss(), tmp_path / "config")
    data = tiny.make_dataset(6)
    with (
        tiny.counted({"model": model.model}) as passes,
        pytest.raises(ValueError, match="GptOssExperts: .* could not be saved"),
    ):
        prune(model, tokenizer, recipe(), data, output_dir=tmp_path / "out")
    assert passes == {"model": 0} and not (tmp_path / "out").exists()


@FUSES
@pytest.mark.contract
def test_oneshot_says_at_once_that_they_cannot_be_packed_and_saving_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setattr("absorb_plugin.pruners.experts._same", lambda *_: False)
    model, out = made("granitemoe"), tmp_path / "out"
    told: list[str] = []

    def told_before(*_: Any) -> None:
        told[:] = told or [line for line in warnings if "could not be saved" in line]

    model.model.register_forward_pre_hook(told_before)
    with pytest.raises(ValueError, match="one tensor.* could not be saved"):
        runs.run(model, recipe(), tmp_path, output_dir=str(out))
    assert len(told) == 1 and "save_pretrained" in told[0]
    assert not out.exists()
    assert linear_sparsity(model) == pytest.approx(0.5, abs=0.01)
    type(model).save_pretrained(model, out)  # who wants the files all the same
    (problem,) = check_checkpoint(out).problems
    assert "random numbers" in problem


@PACKS
def test_llama_4_is_refused_before_minutes_are_spent() -> None:
    """Its Linears do not know what llm-compressor made them of."""
    text = {"num_hidden_layers": 1, "num_local_experts": 4, "head_dim": 8}
    text |= {"interleave_moe_layer_step": 1, "num_key_value_heads": 2}
    small = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4}
    vision = {"num_hidden_layers": 1, "image_size": 28, "vision_output_dim": 32}
    vision |= {"projector_input_dim": 32, "projector_output_dim": 32}
    text |= small | {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0}
    config = Llama4Config(text_config=text, vision_config=vision | small)
    model = Llama4ForConditionalGeneration(config)
    for _ in range(2):  # as it is loaded, and of Linears
        with pytest.raises(ValueError, match="one tensor.* could not be saved"):
            check_packing(model)
        linearize_moe(model)
