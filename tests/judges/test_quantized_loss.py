"""Losses of weights pruned and quantised, against llm-compressor's quantisation."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import apply_quantization_config
from datasets import Dataset
from helpers import naive, runs, tiny
from helpers.probes import run
from helpers.upstream import as_upstream, pruned_copy
from llmcompressor.core import reset_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import PreTrainedModel

from absorb_plugin.blocks import BlockMap, find_blocks
from absorb_plugin.calibration import Batch, split_samples
from absorb_plugin.evaluation.oneshot import quantization_of
from absorb_plugin.evaluation.recipes import QUANTIZATIONS
from absorb_plugin.groups import named
from absorb_plugin.judges import PrunedLoss
from absorb_plugin.pruners import Pruner, SparseGPT, Wanda, quantization
from absorb_plugin.pruners.quantization import (
    QuantizedLinears,
    rounded_weight,
    unjudged,
)
from absorb_plugin.pruners.zeros import final_weight

WEIGHTS_ALONE = ["W8A16", "W4A16", "W4A16_ASYM", "FP8_BLOCK", "MXFP4A16"]
EACH_TOKEN = ["W8A8", "FP8_DYNAMIC", "W4AFP8", "MXFP4"]
SCHEMES = [*WEIGHTS_ALONE, *EACH_TOKEN, "FP8"]  # the last with one scale for all inputs


def make_model(architecture: str = "llama") -> PreTrainedModel:
    """Wide enough for groups and blocks of 128 columns."""
    fields = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    own = {
        "qwen3": {"head_dim": 32},
        "qwen3_moe": {"head_dim": 32, "moe_intermediate_size": 128},
        "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    }.get(architecture, {})
    return tiny.make_model(architecture, **fields, **heads, **own)


def quantized_copy(
    model: PreTrainedModel, scheme: str, batch: Batch, directory: Path
) -> PreTrainedModel:
    """Through `oneshot`, calibrated by a batch."""
    kept = batch["attention_mask"].bool()
    rows = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], kept)]
    fields = {"input_observer": "static_minmax"} if scheme == "FP8" else {}
    reset_session()
    return runs.run(
        copy.deepcopy(model),
        [runs.quantizer(scheme, **fields)],
        directory,
        dataset=Dataset.from_dict({"input_ids": rows}),
        samples=len(rows),
    )


@pytest.mark.contract
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_rounded_as_llm_compressor_does(
    scheme: str, tmp_path: Path
) -> None:
    model = make_model()
    linears = find_blocks(model).linears()
    for number, linear in enumerate(linears.values()):  # zeros, as a pruner leaves them
        linear.weight.data[:, number % 3 :: 3] = 0
        linear.weight.data[5] = 0  # a row whose scale would be none
    before = {name: x.weight.detach().clone() for name, x in linears.items()}
    done = quantized_copy(model, scheme, tiny.make_batch(4), tmp_path)
    for name, weight in before.items():
        linear = done.get_submodule(name)
        ours = rounded_weight(weight, linear.quantization_scheme.weights)
        assert torch.equal(ours, final_weight(linear)), name
        assert not ours[weight == 0].any()  # zeros stay


@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_weights_are_rounded_some_rows_at_a_time(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = runs.quantizer(scheme).resolve_quantization_config()
    args = config.config_groups["group_0"].weights
    weight = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    whole = rounded_weight(weight, args)
    monkeypatch.setattr(quantization, "AT_ONCE", 7 * 256)
    assert torch.equal(rounded_weight(weight, args), whole)


@pytest.mark.contract
@pytest.mark.parametrize(
    "architecture, pruner, scheme",
    [
        *(("llama", Wanda(), scheme) for scheme in SCHEMES),
        *(("opt", Wanda(), scheme) for scheme in ("W8A8", "W4A16")),
        *(
            ("qwen3", SparseGPT(block_size=16, dampening=0.5), scheme)
            for scheme in ("W4A16", "FP8")
        ),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_losses_are_those_of_a_copy_pruned_and_quantised(
    architecture: str, pruner: Pruner, scheme: str, tmp_path: Path
) -> None:
    model, both = make_model(architecture), tiny.make_batch(5, 14)
    blocks = find_blocks(model)
    calibration, *_ = split_samples([both], 3)
    judged = {name: rows[3:] for name, rows in both.items()}
    candidates = [np.full(len(blocks.linears()), s) for s in (0.5, 0.3)]
    losses = losses_of(model, blocks, pruner, candidates, both, scheme)
    plain = losses_of(model, blocks, pruner, candidates, both, None)
    for one, found, unrounded in zip(candidates, losses, plain, strict=True):
        prune = as_upstream(pruner)
        pruned = pruned_copy(model, blocks, named(blocks, one), calibration, prune)
        done = quantized_copy(pruned, scheme, calibration, tmp_path)
        with torch.no_grad():
            expected = naive.loss_sums(done, judged).numpy()
        # factors that are made in another order prune the other of two equal weights
        close = 2e-2 if pruner.hessians else 1e-5
        np.testing.assert_allclose(found, expected, rtol=close)
        if not pruner.hessians:
            assert np.abs(found / unrounded - 1).max() > 10 * close


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC"])
def test_experts_of_a_mixture_are_quantised_too(scheme: str, tmp_path: Path) -> None:
    model, both = make_model("qwen3_moe"), tiny.make_batch(5, 14)
    blocks = find_blocks(model)
    nothing = [np.zeros(len(blocks.linears()))]
    (found,) = losses_of(model, blocks, Wanda(), nothing, both, scheme)
    done = quantized_copy(model, scheme, both, tmp_path)
    assert any("experts" in name for name in blocks.linears())
    with torch.no_grad():
        expected = naive.loss_sums(done, {k: rows[3:] for k, rows in both.items()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def losses_of(
    model: PreTrainedModel,
    blocks: BlockMap,
    pruner: Pruner,
    candidates: list[np.ndarray],
    batch: Batch,
    scheme: str | None,
) -> np.ndarray:
    model = copy.deepcopy(model)
    before = tiny.snapshot(model)
    quantized = None
    if scheme is not None:
        quantized = runs.given_schemes(model, runs.quantizer(scheme))
    judge = PrunedLoss(find_blocks(model), pruner, candidates, 3, quantized=quantized)
    run(model, [batch], judge)
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    return judge.result()[0]


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("architecture", ["llama", "opt", "qwen3_moe"])
def test_schemes_are_known_before_they_are_given(
    architecture: str, quantize: str
) -> None:
    model = make_model(architecture)
    config, blocks = quantization_of(model, quantize), find_blocks(model)
    soon = QuantizedLinears.to_be(config, model, blocks, quantize)
    apply_quantization_config(model, config)
    given = QuantizedLinears.of([quantize], blocks)
    assert soon.modifiers == given.modifiers
    assert [list(one) for one in soon.schemes] == [list(one) for one in given.schemes]
    for one, other in zip(soon.identity(), given.identity(), strict=True):
        assert {k: _args(v) for k, v in one.items()} == {
            k: _args(v) for k, v in other.items()
        }
    names = [
        block.full_name(name)
        for block, schemes in zip(blocks.blocks, soon.schemes, strict=True)
        for name in schemes
    ]
    assert set(names) == blocks.linears().keys()


def _args(scheme: str) -> dict:
    """Of the weights and inputs; what a model is saved as is known later."""
    found = json.loads(scheme)
    return {name: found[name] for name in ("weights", "input_activations")}


def test_what_is_quantised_beside_the_blocks_is_told() -> None:
    model = make_model()
    runs.given_schemes(model, runs.quantizer("W8A8"))
    assert unjudged(model, find_blocks(model)) == []
    whole = make_model()
    every = QuantizationModifier(targets=["Linear"], scheme="W8A8")
    runs.given_schemes(whole, every)
    assert unjudged(whole, find_blocks(whole)) == ["lm_head"]
    values = make_model()
    arguments = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    runs.given_schemes(values, QuantizationModifier(kv_cache_scheme=arguments))
    blocks = find_blocks(values)
    assert unjudged(values, blocks) == [f"{b.name}.self_attn" for b in blocks.blocks]
