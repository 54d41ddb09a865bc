"""Models and tokenizers from a directory or the hub, for evaluation and allocation."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

__all__ = ["check_length", "load_config", "load_model", "load_tokenizer"]


def load_config(model: str) -> PretrainedConfig:
    """
    :param model: directory or hub id, of which only the config is read
    :return: config of the language model
    :raises FileNotFoundError: if `model` looks like a directory and there is none
    """
    if not Path(model).exists() and (
        model.startswith((".", "/", "~")) or model.count("/") > 1
    ):
        raise FileNotFoundError(f"{model}: no such model directory")
    return AutoConfig.from_pretrained(model).get_text_config()


def check_length(config: PretrainedConfig, length: int) -> None:
    """
    :raises ValueError: if windows of `length` tokens do not fit the model
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"seq_len={length} is longer than the model's {positions} positions"
        )


def load_tokenizer(model: str) -> Any:
    return AutoTokenizer.from_pretrained(model)


def load_model(model: str, dtype: str) -> PreTrainedModel:
    """Load for evaluation: on the accelerator, spread over several, or on the CPU."""
    device_map = "auto" if torch.accelerator.is_available() else None
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, device_map=device_map
    )
