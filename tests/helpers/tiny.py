"""Tiny models with random weights, one per architecture, and text for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers.words import make_tokenizer

# Not by way of absorb_plugin: replays run without it.
try:
    from llmcompressor.modeling.moe.linearize import linearize_moe
except ModuleNotFoundError:  # llm-compressor 0.11: experts are Linears as they come
    linearize_moe = None

VOCABULARY = 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# model class, what its configuration has beside SHAPE (None: it has no such field)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 5.0,
        },
    ),
    "opt": (
        "OPTForCausalLM",
        {
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "init_std": 0.2,
            "dropout": 0.1,
            "intermediate_size": None,
            "num_key_value_heads": None,
            "initializer_range": None,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {"num_key_value_heads": None}),
    "phi3": ("Phi3ForCausalLM", {}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {
            "head_dim": 8,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
}

GPT_NAMES = {  # what the classes derived from GPT-2's call the fields of SHAPE
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "intermediate_size": None,
    "max_position_embeddings": None,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
# Those that only tests/test_architectures.py takes.
MORE_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    ),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 8, "sliding_window": 4}),
    "phi": ("PhiForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {}),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    ),
    "cohere2": ("Cohere2ForCausalLM", {"sliding_window": 4}),
    "stablelm": ("StableLmForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {"sliding_window": 4}),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 8}),
    "falcon": (
        "FalconForCausalLM",
        {
            "num_key_value_heads": None,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "intermediate_size": None,
            "ffn_hidden_size": 48,
        },
    ),
    "bloom": ("BloomForCausalLM", {**GPT_NAMES, "n_embd": None, "hidden_size": 32}),
    "mpt": (
        "MptForCausalLM",
        {
            **dict.fromkeys(GPT_NAMES),
            **{"d_model": 32, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2},
        },
    ),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {**GPT_NAMES, "n_inner": 48}),
    "gptj": ("GPTJForCausalLM", {**GPT_NAMES, "rotary_dim": 8, "n_inner": 48}),
    "lfm2": (
        "Lfm2ForCausalLM",
        {
            "layer_types": ["conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "jamba": (
        "JambaForCausalLM",
        {
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_expand": 1,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("BambaForCausalLM", {**MAMBA2, "attn_layer_indices": [1]}),
    "mamba": (
        "MambaForCausalLM",
        {"state_size": 8, "num_attention_heads": None, "num_key_value_heads": None},
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        {
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "layers_block_type": ["hybrid", "mamba", "hybrid"],
            "hybrid_layer_ids": [0, 2],
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "num_key_value_heads": 4,
        },
    ),
}


def make_model(architecture: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model in float32, in evaluation mode."""
    name, extra = (ARCHITECTURES | MORE_ARCHITECTURES)[architecture]
    model_class = getattr(transformers, name)
    fields = {**SHAPE, **extra, **overrides}
    config = model_class.config_class(
        **{key: value for key, value in fields.items() if value is not None}
    )
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    if linearize_moe is not None:
        linearize_moe(model)  # as oneshot does
    return model


def with_images(kind: str, vision_width: int = 48) -> PreTrainedModel:
    """
    :param kind: "gemma3" or "llava"
    :param vision_width: of the MLP in the vision tower
    """
    text = {**SHAPE, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"model_type": "llama"}
    vision = {
        "hidden_size": 32,
        "intermediate_size": vision_width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    fields = {"text_config": text, "vision_config": vision, "image_token_index": 9}
    if kind == "llava":
        vision |= {"projection_dim": 32, "model_type": "clip_vision_model"}
        model_class = transformers.LlavaForConditionalGeneration
    else:
        text |= {"head_dim": 8, "model_type": "gemma3_text"}
        fields |= {"mm_tokens_per_image": 4}
        fields |= {"boi_token_index": 10, "eoi_token_index": 11}
        model_class = transformers.Gemma3ForConditionalGeneration
    torch.manual_seed(0)
    return model_class(model_class.config_class(**fields)).float().eval()


def gpt_oss() -> PreTrainedModel:
    """Its gate and up are in turn, not side by side."""
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY,
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
    model = transformers.GptOssForCausalLM(config).eval()
    for parameter in model.parameters():  # biases too
        parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def small(**overrides: Any) -> PreTrainedModel:
    """A LLaMA of two blocks."""
    return make_model("llama", num_hidden_layers=2, **overrides)


def make_batch(
    samples: int = 3, tokens: int = 12, padding: str | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """
    :param padding: "left" or "right" for samples of unequal length
    :return: input_ids and attention_mask, shape (samples, tokens)
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (samples, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for sample in range(samples if padding else 0):
        unused = slice(tokens - 2 * sample, None)
        if padding == "left":
            unused = slice(0, 2 * sample)
        ids[sample, unused] = 0
        mask[sample, unused] = 0
    return {"input_ids": ids, "attention_mask": mask}


def make_dataset(samples: int = 8, tokens: int = 16, seed: int = 0) -> Dataset:
    batch = make_batch(samples, tokens, seed=seed)
    return Dataset.from_dict({name: rows.tolist() for name, rows in batch.items()})


def with_tokenizer(
    model: PreTrainedModel, directory: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """What `oneshot` wants: a model whose config can be read again, a tokenizer."""
    model.config.save_pretrained(directory)
    model.config._name_or_path = str(directory)
    return model, make_tokenizer(bos=False)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit-identical."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def assert_untouched(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Weights bit-identical, no hook and no replaced forward left."""
    assert_same(snapshot(model), before)
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        # llm-compressor itself leaves the head's own forward in the instance, and
        # wraps that of offloaded modules
        if not hasattr(module, "_original_forward_func"):
            assert module.forward == type(module).forward.__get__(module), name


@contextmanager
def counted(modules: dict[str, torch.nn.Module]) -> Iterator[dict[str, int]]:
    """How often each module runs within the context."""
    counts = dict.fromkeys(modules, 0)

    def hook(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[name] += 1

        return count

    handles = [m.register_forward_hook(hook(name)) for name, m in modules.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
