"""What most commands read before the model's weights are loaded."""

from pathlib import Path
from typing import Any

from absorb_plugin.cli.options import Dtype

__all__ = ["read_inputs"]


def read_inputs(
    model: str,
    text: Path | None,
    dataset: str | None,
    split: str,
    seq_len: int,
    dtype: Dtype,
    optional: bool = False,
) -> tuple[list[str], Any]:
    """
    Documents and tokenizer. All that can be wrong with either, or with the length of a
    window, is found here, before the model's weights are loaded.

    :param optional: that neither text nor dataset is given means no documents
    """
    from absorb_plugin.evaluation.loading import (
        check_length,
        load_config,
        load_tokenizer,
    )

    documents = _read_documents(text, dataset, split, optional)
    config = load_config(model)
    if documents:
        check_length(config, seq_len)
    _warn_if_slow(config, dtype)
    return documents, load_tokenizer(model)


def _read_documents(
    text: Path | None, dataset: str | None, split: str, optional: bool
) -> list[str]:
    from absorb_plugin.evaluation.text import read_dataset, read_text

    if text is not None and dataset is not None:
        raise ValueError("give --text or --dataset, not both")
    if text is not None:
        return read_text(text)
    if dataset is not None:
        return read_dataset(dataset, split)
    if optional:
        return []
    raise ValueError("no text: give --text FILE or --dataset NAME")


def _warn_if_slow(config: Any, dtype: Dtype) -> None:
    """
    :param config: of the model that is about to be loaded in `dtype`
    """
    import torch
    from loguru import logger

    from absorb_plugin.cpu import bfloat16_is_slow

    is_bfloat16 = dtype is Dtype.bfloat16 or (
        dtype is Dtype.auto and config.dtype == torch.bfloat16
    )
    if is_bfloat16 and bfloat16_is_slow():
        logger.warning(
            "This CPU has no fast bfloat16: --dtype float32 is several times faster"
        )
