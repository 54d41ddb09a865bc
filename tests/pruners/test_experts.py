"""A saved mixture holds its experts by names that transformers reads."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import runs, tiny
from llmcompressor.core import reset_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
)

from absorb_plugin._llmcompressor import LINEAR_EXPERTS, linearize_moe
from absorb_plugin.evaluation.check import check_checkpoint
from absorb_plugin.evaluation.oneshot import prune
from absorb_plugin.evaluation.perplexity import linear_sparsity
from absorb_plugin.pruners.experts import check_packing, packed_experts

PACKS = pytest.mark.skipif(
    not hasattr(LINEAR_EXPERTS[0] if LINEAR_EXPERTS else None, "to_experts_module"),
    reason="llm-compressor is older than 0.14",
)
FUSES = pytest.mark.skipif(
    not LINEAR_EXPERTS, reason="transformers 4 has experts of Linears"
)
BY_EXPERT = ["mixtral", "phimoe", "minimax", "qwen3_moe", "jamba"]
OURS = {"allocator": "uniform", "strength": 0}
MINIMAX = {"head_dim": 8, "block_size": 4, "num_local_experts": 4}


def made(name: str) -> PreTrainedModel:
    if name != "minimax":
        return tiny.make_model(name)
    kind = ("MiniMaxForCausalLM", MINIMAX | {"intermediate_size": 16})
    with patch.dict(tiny.MORE_ARCHITECTURES, minimax=kind):
        return tiny.make_model(name)


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
    ours = runs.absorption(**OURS)
    pruned = runs.run(model, [ours, runs.pruner()], tmp_path, output_dir=str(out))
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
    recipe = [runs.absorption(**OURS), runs.pruner(), quantizer]
    out = tmp_path / "out"
    runs.run(made("mixtral"), recipe, tmp_path, output_dir=str(out))
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
    recipe = [runs.absorption(**OURS), runs.pruner()]
    data = tiny.make_dataset(6)
    pruned = prune(model, tokenizer, recipe, data, output_dir=out)
    reset_session()
    assert linear_sparsity(pruned) == pytest.approx(0.5, abs=0.01)  # of Linears again
    expect_the_same(pruned, out)
    report = check_checkpoint(out)
    assert not report.problems and report.planned == pytest.approx(0.5)
    assert report.zeros == pytest.approx(0.5, abs=0.01)
    assert not [line for line in warnings if "in one tensor" in line]
    assert (out / "recipe.yaml").is_file() and (out / "tokenizer.json").is_file()


@FUSES
@pytest.mark.contract
def test_oneshot_is_told_of_experts_of_one_tensor(
    tmp_path: Path, warnings: list[str]
) -> None:
    out, recipe = tmp_path / "out", [runs.absorption(**OURS), runs.pruner()]
    runs.run(made("granitemoe"), recipe, tmp_path, output_dir=str(out))
    reset_session()
    (told,) = [line for line in warnings if "packed_experts" in line]
    assert "GraniteMoeForCausalLM" in told
    (problem,) = check_checkpoint(out).problems
    assert "random numbers" in problem


def gpt_oss() -> PreTrainedModel:
    """Its gate and up are in turn, not side by side."""
    config = GptOssConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        attn_implementation="eager",
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    for parameter in model.parameters():  # biases too
        parameter.data = 0.1 * torch.randn_like(parameter)
    return model


@PACKS
@pytest.mark.contract
def test_experts_with_gate_and_up_in_turn_are_packed_so(tmp_path: Path) -> None:
    model = gpt_oss()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_packing(model)
    linearize_moe(model)
    with packed_experts(model):
        tiny.assert_same(model.state_dict(), before)
    out = tmp_path / "out"
    model, tokenizer = tiny.with_tokenizer(model, tmp_path / "config")
    recipe, data = [runs.absorption(**OURS), runs.pruner()], tiny.make_dataset(6)
    pruned = prune(model, tokenizer, recipe, data, output_dir=out)
    reset_session()
    expect_the_same(pruned, out)


@PACKS
@pytest.mark.contract
def test_experts_that_cannot_be_packed_are_refused_before_minutes_are_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("absorb_plugin.pruners.experts._in_turn", lambda x, dim: x)
    model, tokenizer = tiny.with_tokenizer(gpt_oss(), tmp_path / "config")
    recipe, data = [runs.absorption(**OURS), runs.pruner()], tiny.make_dataset(6)
    with (
        tiny.counted({"model": model.model}) as passes,
        pytest.raises(ValueError, match="GptOssExperts: .* could not be saved"),
    ):
        prune(model, tokenizer, recipe, data, output_dir=tmp_path / "out")
    assert passes == {"model": 0} and not (tmp_path / "out").exists()
