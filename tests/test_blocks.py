"""Which blocks a model has."""

import numpy as np
import pytest
import torch
import transformers
from helpers import tiny
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from absorb_plugin.blocks import find_blocks

FIRST = {
    "llama": ("model.layers.0", 7),
    "mistral": ("model.layers.0", 7),
    "qwen3": ("model.layers.0", 7),
    "gemma3": ("model.layers.0", 7),
    "opt": ("model.decoder.layers.0", 6),
    "gpt_neox": ("gpt_neox.layers.0", 4),
    "phi3": ("model.layers.0", 4),
    "qwen3_moe": ("model.layers.0", 4 + 4 * 3),
    "falcon_h1": ("model.layers.0", 9),
}


@pytest.mark.parametrize("architecture", list(FIRST))
def test_blocks_of_every_architecture(architecture: str) -> None:
    model = tiny.make_model(architecture)
    found = find_blocks(model)
    name, linears = FIRST[architecture]
    assert found.blocks[0].name == name
    assert [len(block.linears) for block in found.blocks] == [linears] * 3
    assert len(found) == 3 and found.prunable == [0, 1, 2]
    modules = dict(model.named_modules())
    for block in found.blocks:
        assert modules[block.name] is block.module
    for full, linear in found.linears().items():
        assert modules[full] is linear
    expected = [
        sum(linear.weight.numel() for linear in block.linears.values())
        for block in found.blocks
    ]
    assert found.parameters.tolist() == expected
    assert model.get_output_embeddings() not in found.linears().values()


def test_restricted_blocks_stay_in_the_chain(llama: PreTrainedModel) -> None:
    whole = find_blocks(llama)
    names = ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.down_proj", "lm_head"]
    found = whole.restrict(names)
    assert len(found) == 3 and found.prunable == [0, 2]
    assert list(found.linears()) == names[:2]
    assert found.modules == whole.modules
    np.testing.assert_array_equal(found.parameters, [32 * 48, 48 * 32])


def test_block_class_named_by_the_user(llama: PreTrainedModel) -> None:
    """It decides between lists that the model itself does not tell apart."""
    llama._no_split_modules = []
    llama.model.wider = torch.nn.ModuleList([torch.nn.Linear(500, 500)])
    assert len(find_blocks(llama)) == 1
    assert len(find_blocks(llama, "LlamaDecoderLayer")) == 3
    assert len(find_blocks(llama, ["LlamaDecoderLayer"])) == 3


def test_no_list_of_modules(llama: PreTrainedModel) -> None:
    llama.model.layers = torch.nn.Sequential(*llama.model.layers)
    with pytest.raises(ValueError, match="no decoder block found.*one ModuleList"):
        find_blocks(llama)


def test_the_largest_stack_is_the_decoder(llama: PreTrainedModel) -> None:
    """Some models carry further blocks of the same class, to predict more tokens."""
    block_class, config = type(llama.model.layers[0]), llama.config
    llama.model.extra = torch.nn.ModuleList([block_class(config, 0)])
    assert [b.name for b in find_blocks(llama).blocks] == [
        f"model.layers.{index}" for index in range(3)
    ]


def test_encoder_decoder_is_refused() -> None:
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_blocks(T5ForConditionalGeneration(config))


def test_conv1d_weights_are_refused() -> None:
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    with pytest.raises(ValueError, match=r"hold no torch\.nn\.Linear.*Conv1D"):
        find_blocks(GPT2LMHeadModel(config))


def test_a_block_without_linears_is_not_prunable(llama: PreTrainedModel) -> None:
    class Bare(type(llama.model.layers[0])):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    llama.model.layers[1] = Bare()
    found = find_blocks(llama)
    assert len(found) == 3 and found.prunable == [0, 2]


@pytest.mark.parametrize("shared", ["parameter", "numbers"])
def test_a_weight_of_two_linears_is_nobodys(
    shared: str, llama: PreTrainedModel, warnings: list[str]
) -> None:
    attention = llama.model.layers[1].self_attn
    weight = attention.k_proj.weight
    if shared == "numbers":
        weight = torch.nn.Parameter(weight.data)
    attention.v_proj.weight = weight
    names = find_blocks(llama).linears()
    assert len(names) == 19
    assert not [n for n in names if n.startswith("model.layers.1.") and "k_p" in n]
    assert any("2 Linears share their weight with another" in one for one in warnings)


def test_parts_of_one_tensor_are_weights_of_their_own(llama: PreTrainedModel) -> None:
    attention = llama.model.layers[1].self_attn
    both = torch.cat([attention.k_proj.weight.data, attention.v_proj.weight.data])
    for linear, part in zip((attention.k_proj, attention.v_proj), both.chunk(2)):
        linear.weight = torch.nn.Parameter(part)
    assert len(find_blocks(llama).linears()) == 21


@pytest.mark.parametrize("outside", ["lm_head", "embed_tokens"])
def test_a_weight_of_the_head_is_no_blocks(
    outside: str, llama: PreTrainedModel, warnings: list[str]
) -> None:
    own = llama.model.layers[1].self_attn.q_proj
    other = torch.nn.Linear(own.in_features, own.out_features, bias=False)
    llama.model.layers[1].self_attn.q_proj = other
    home = llama if outside == "lm_head" else llama.model
    getattr(home, outside).weight = other.weight
    assert len(find_blocks(llama).linears()) == 20
    assert any("1 Linears share their weight" in one for one in warnings)


def test_attention_beside_experts_is_no_router(llama: PreTrainedModel) -> None:
    """Experts may lie in the block itself, where sizes alone could deceive."""
    layer = llama.model.layers[0]
    experts = [torch.nn.Sequential(torch.nn.Linear(32, 32)) for _ in range(16)]
    layer.experts = torch.nn.ModuleList([*experts, torch.nn.SiLU()])
    layer.router = torch.nn.Linear(32, 16)
    assert layer.self_attn.k_proj.out_features == 16
    block = find_blocks(llama).blocks[0]
    assert block.routers == ("router",)
    assert "self_attn.k_proj" in block.linears and "experts.15.0" in block.linears


class GateRouter(torch.nn.Module):
    """As Zaya's: two layers, and more outputs than experts."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Linear(32, 8)
        self.out = torch.nn.Linear(8, 5)


def test_routers_told_by_name_or_class(llama: PreTrainedModel) -> None:
    layer = llama.model.layers[0]
    layer.mlp.router = torch.nn.Linear(32, 4)  # fused experts, as Aria's
    layer.mlp.gate = GateRouter()
    block = find_blocks(llama).blocks[0]
    assert set(block.routers) == {"mlp.router", "mlp.gate.down", "mlp.gate.out"}
    assert {"mlp.gate_proj", "self_attn.q_proj"} < set(block.linears)


def test_what_chooses_tokens_to_attend_to_stays_dense(llama: PreTrainedModel) -> None:
    """DeepSeek V3.2: it chooses all in texts as short as ours, and has no slope."""
    layer = llama.model.layers[0]
    layer.self_attn.indexer = torch.nn.Module()
    layer.self_attn.indexer.wk = torch.nn.Linear(32, 8)
    layer.self_attn.chooser = type("SparseIndexer", (GateRouter,), {})()
    block = find_blocks(llama).blocks[0]
    assert set(block.routers) == {
        *("self_attn.indexer.wk", "self_attn.chooser.down", "self_attn.chooser.out")
    }


def test_what_holds_most_of_a_block_is_no_router(llama: PreTrainedModel) -> None:
    """A mixture of depths: the block that is routed to lies beside the router."""
    layer = llama.model.layers[0]
    inner = type("DepthRouter", (torch.nn.Sequential,), {})
    layer.router = inner(torch.nn.Linear(32, 512), torch.nn.Linear(512, 32))
    assert find_blocks(llama).blocks[0].routers == ()


def test_routers_of_jetmoe() -> None:
    config = transformers.JetMoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=4,
    )
    block = find_blocks(transformers.JetMoeForCausalLM(config)).blocks[1]
    assert block.routers == ("mlp.router.layer", "self_attention.experts.router.layer")
    assert list(block.linears) == ["self_attention.kv_proj"]
