"""Tiny models with random weights, one per architecture, and text for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from cli_fixtures import make_tokenizer
from datasets import Dataset
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import PreTrainedModel, PreTrainedTokenizerFast

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


def make_model(architecture: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model in float32, in evaluation mode."""
    name, extra = ARCHITECTURES[architecture]
    model_class = getattr(transformers, name)
    fields = {**SHAPE, **extra, **overrides}
    config = model_class.config_class(
        **{key: value for key, value in fields.items() if value is not None}
    )
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    linearize_moe(model)  # as oneshot does
    return model


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
