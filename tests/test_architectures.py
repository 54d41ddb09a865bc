"""Allocation and pruning over the architectures of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import runs, tiny
from llmcompressor.core import reset_session
from transformers import PreTrainedModel

from absorb_plugin.blocks import BlockMap, find_blocks
from absorb_plugin.evaluation.allocation import allocate_model
from absorb_plugin.signals import SIGNALS

BUDGET = 0.5
# first block, number of its Linears that are pruned, of its routers
BLOCKS = {
    "llama": ("model.layers.0", 7, 0),
    "mistral": ("model.layers.0", 7, 0),
    "qwen3": ("model.layers.0", 7, 0),
    "gemma3": ("model.layers.0", 7, 0),
    "opt": ("model.decoder.layers.0", 6, 0),
    "gpt_neox": ("gpt_neox.layers.0", 4, 0),
    "phi3": ("model.layers.0", 4, 0),
    "qwen3_moe": ("model.layers.0", 4 + 4 * 3, 0),  # its router is no Linear
    "falcon_h1": ("model.layers.0", 9, 0),
    "mixtral": ("model.layers.0", 4 + 4 * 3, 0),
    "qwen2": ("model.layers.0", 7, 0),
    "qwen2_moe": ("model.layers.0", 4 + 4 * 3 + 3, 1),
    "gemma2": ("model.layers.0", 7, 0),
    "phi": ("model.layers.0", 6, 0),
    "olmo2": ("model.layers.0", 7, 0),
    "granite": ("model.layers.0", 7, 0),
    "granitemoe": ("model.layers.0", 4 + 4 * 3, 0),
    "phimoe": ("model.layers.0", 4 + 4 * 3, 1),
    "cohere2": ("model.layers.0", 7, 0),
    "stablelm": ("model.layers.0", 7, 0),
    "starcoder2": ("model.layers.0", 6, 0),
    "glm4": ("model.layers.0", 6, 0),
    "falcon": ("transformer.h.0", 4, 0),
    "bloom": ("transformer.h.0", 4, 0),
    "mpt": ("transformer.blocks.0", 4, 0),
    "gpt_bigcode": ("transformer.h.0", 4, 0),
    "gptj": ("transformer.h.0", 6, 0),
    "lfm2": ("model.layers.0", 5, 0),
    "jamba": ("model.layers.0", 7, 0),  # the second block has the experts
    "bamba": ("model.layers.0", 5, 0),
    "mamba": ("backbone.layers.0", 4, 0),
    "zamba2": ("model.layers.0", 3, 0),  # the shared transformer stays dense
}
# Linears whose weight the block uses without calling them, so nobody sees their input
UNCALLED = {"jamba": "mamba.dt_proj", "mamba": "mixer.dt_proj"}


def check_pruned(
    model: PreTrainedModel, before: dict[str, torch.Tensor], targets: dict[str, float]
) -> None:
    """Wanda's zeros are exact in every row; everything else is bit-identical."""
    after = tiny.snapshot(model)
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in targets:
            assert torch.equal(after[name], tensor), name
    for name, target in targets.items():
        zeros = (after[f"{name}.weight"] == 0).sum(dim=1)
        columns = before[f"{name}.weight"].shape[1]
        assert set(zeros.tolist()) == {int(columns * target)}, name


def prune(
    model: PreTrainedModel, directory: Path, monkeypatch: Any, **fields: Any
) -> dict[str, Any]:
    """:return: the profile of a run through `oneshot`"""
    monkeypatch.setattr("absorb_plugin.report.figure.draw", lambda *_: b"")
    ours = runs.absorption(report_dir=directory)
    # one pass over the whole model: tracing it for the sequential pipeline takes
    # longer than all the rest
    runs.run(model, [ours, runs.pruner()], directory, **{"pipeline": "basic", **fields})
    return json.loads((directory / "profile.json").read_text())


def targets_of(profile: dict[str, Any]) -> dict[str, float]:
    return {
        f"{block['name']}.{name}": linear["sparsity"]
        for block in profile["blocks"]
        for name, linear in block["linears"].items()
    }


@pytest.mark.parametrize("architecture", list(BLOCKS))
def test_every_architecture(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make_model(architecture)
    before, blocks = tiny.snapshot(model), find_blocks(model)
    first = blocks.blocks[0]
    assert (first.name, len(first.linears), len(first.routers)) == BLOCKS[architecture]
    assert len(blocks) == 3 and blocks.prunable == [0, 1, 2]

    for signal in SIGNALS:
        found = runs.allocate(model, [tiny.make_batch()], BUDGET, signal=signal)
        assert found.achieved() == pytest.approx(BUDGET, abs=1e-6)
        assert found.direction.any(), signal
        tiny.assert_untouched(model, before)

    profile = prune(model, tmp_path, monkeypatch)
    targets, uncalled = targets_of(profile), UNCALLED.get(architecture)
    assert targets.keys() == blocks.linears().keys()
    assert profile["unseen_linears"] == [
        name for name in targets if uncalled and name.endswith(uncalled)
    ]
    pruned = {n: t for n, t in targets.items() if n not in profile["unseen_linears"]}
    assert len({*pruned.values()}) > 1
    check_pruned(model, before, pruned)


def test_all_architectures_are_listed() -> None:
    assert BLOCKS.keys() == tiny.ARCHITECTURES.keys() | tiny.MORE_ARCHITECTURES.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_tied_embeddings(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make_model("llama", tie_word_embeddings=True).to(dtype)
    before = tiny.snapshot(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    profile = prune(model, tmp_path, monkeypatch)
    assert profile["model"]["dtype"] == str(dtype).removeprefix("torch.")
    assert model.dtype == dtype
    check_pruned(model, before, targets_of(profile))


@pytest.mark.parametrize(
    "targets", [["Linear"], [r"re:.*layers[.]\d+[.].*(proj|gate|router)$"]], ids=str
)
@pytest.mark.parametrize("architecture", ["jamba", "qwen2_moe", "phimoe"])
def test_routers_stay_dense(
    architecture: str,
    targets: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.make_model(architecture)
    before = tiny.snapshot(model)
    routers = find_blocks(model).routers
    assert len(routers) == {"jamba": 1, "qwen2_moe": 3, "phimoe": 3}[architecture]
    monkeypatch.setattr("absorb_plugin.report.figure.draw", lambda *_: b"")
    ours = runs.absorption(report_dir=tmp_path)
    pruner = runs.pruner(targets=targets)
    runs.run(model, [ours, pruner], tmp_path, pipeline="basic")
    for name in routers:
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("calibrate_all", [True, False])
@pytest.mark.parametrize("granularity", ["block", "linear"])
def test_experts_without_tokens_are_reported(
    architecture: str,
    calibrate_all: bool,
    granularity: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
) -> None:
    monkeypatch.setattr("absorb_plugin.report.figure.draw", lambda *_: b"")
    experts = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}
    model = tiny.make_model(architecture, **{experts[architecture]: 16})
    before = tiny.snapshot(model)
    ours = runs.absorption(
        report_dir=tmp_path, granularity=granularity, strength="auto"
    )
    runs.run(
        model,
        [ours, runs.pruner()],
        tmp_path,
        dataset=tiny.make_dataset(2, tokens=2),
        samples=2,
        pipeline="basic",
        moe_calibrate_all_experts=calibrate_all,
    )
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["achieved"] == pytest.approx(BUDGET, abs=1e-6)
    unseen, targets = profile["unseen_linears"], targets_of(profile)
    told = [message for message in warnings if "saw no token" in message]
    if calibrate_all:
        assert unseen == [] and not told
        check_pruned(model, before, targets)
        return
    assert unseen and len(told) == 1 and unseen[0] in told[0]
    assert all(".experts." in name for name in unseen)
    after = tiny.snapshot(model)
    dense = [
        name
        for name, target in targets.items()
        if int(before[f"{name}.weight"].shape[1] * target)
        and torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    ]
    assert set(dense) <= set(unseen)  # others were seen by the pruner alone
    check_pruned(model, before, {n: t for n, t in targets.items() if n not in dense})


def test_allocate_alone_linearises_experts() -> None:
    model_class = transformers.MixtralForCausalLM
    linear = tiny.make_model("mixtral")
    fused = model_class(linear.config).float().eval()
    assert not any(".experts." in name for name in find_blocks(fused).linears())
    found = allocate_model(fused, tiny.make_dataset(2), BUDGET, runs.absorption())
    assert found.blocks.linears().keys() == find_blocks(linear).linears().keys()


def test_a_weight_shared_by_blocks_stays_dense(warnings: list[str]) -> None:
    found: BlockMap = find_blocks(tiny.make_model("zamba2"))
    assert not any("shared_transformer" in name for name in found.linears())
    assert any("share their weight" in message for message in warnings)


TEXT = {**tiny.SHAPE, "head_dim": 8}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,  # more than the text has
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3_with_vision() -> PreTrainedModel:
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**TEXT, sliding_window=4),
            vision_config=transformers.SiglipVisionConfig(**VISION),
            mm_tokens_per_image=4,
        )
    )


def llava() -> PreTrainedModel:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
            image_token_index=tiny.VOCABULARY - 1,
        )
    )


@pytest.mark.parametrize("make", [gemma3_with_vision, llava])
def test_of_vision_and_language_the_text_decoder(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make().float().eval()
    before, blocks = tiny.snapshot(model), find_blocks(model)
    assert [block.name for block in blocks.blocks] == [
        f"model.language_model.layers.{index}" for index in range(3)
    ]
    targets = targets_of(prune(model, tmp_path, monkeypatch))
    assert targets.keys() == blocks.linears().keys()
    check_pruned(model, before, targets)  # the vision tower is bit-identical


REFUSED = {
    "xlnet": (
        "XLNetLMHeadModel",
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16},
        r"of shape \(\d+, 1, 16\), not \(batch, tokens, hidden\).*strength: 0",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
        r"hold no torch\.nn\.Linear.*Conv1D",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "encoder-decoder",
    ),
    "bart": (
        "BartForConditionalGeneration",
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
        },
        "encoder-decoder",
    ),
}


def gemma3n() -> PreTrainedModel:
    config = transformers.Gemma3nTextConfig(
        **{**TEXT, "num_hidden_layers": 2},
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=tiny.VOCABULARY,
        laurel_rank=4,
        num_kv_shared_layers=0,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 2,
    )
    return transformers.Gemma3nForCausalLM(config).float().eval()


def test_parallel_streams_are_refused_at_the_first_block(tmp_path: Path) -> None:
    model = gemma3n()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"block model\.layers\.0 .*several parallel"):
        runs.run(model, [runs.absorption(), runs.pruner()], tmp_path)
    tiny.assert_untouched(model, before)


@pytest.mark.parametrize("architecture", list(REFUSED))
def test_what_is_refused_is_refused_at_once(architecture: str, tmp_path: Path) -> None:
    name, fields, message = REFUSED[architecture]
    model_class = getattr(transformers, name)
    config = model_class.config_class(vocab_size=tiny.VOCABULARY, **fields)
    model = model_class(config)
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        runs.run(model, [runs.absorption(), runs.pruner()], tmp_path)
    tiny.assert_same(tiny.snapshot(model), before)
    reset_session()
