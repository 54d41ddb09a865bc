"""What most commands read before the model's weights are loaded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absorb_plugin.cli.options import Dtype

__all__ = ["Source", "check_samples", "check_sparsity", "read_model"]


@dataclass(frozen=True)
class Source:
    """
    Where the text comes from: --text or --dataset, --split and --text-column.

    :param usual: the split where none is named
    """

    text: Path | None
    dataset: str | None
    split: str | None
    column: str | None
    usual: str = "train"

    @property
    def name(self) -> str:
        """Of the file, or of the dataset and its split."""
        return f"{self.dataset} ({self._split})" if self.dataset else str(self.text)

    @property
    def _split(self) -> str:
        return self.split or self.usual

    def documents(self) -> Iterator[Any]:
        """
        :raises ValueError: if there is no text, or two
        """
        from absorb_plugin.evaluation.documents import read_dataset, read_text

        if self.text is not None and self.dataset is not None:
            raise ValueError("give --text or --dataset, not both")
        if self.text is not None and self.split is not None:
            raise ValueError(f"--split {self.split}: a file has no splits, omit it")
        if self.text is not None:
            return read_text(self.text, self.column)
        if self.dataset is not None:
            return read_dataset(self.dataset, self._split, self.column)
        raise ValueError("no text: give --text FILE or --dataset NAME")


def check_sparsity(option: str, sparsity: float, most: float) -> None:
    """
    :param option: that asks for it
    :param most: share of a Linear that may go
    :raises ValueError: if it is no sparsity, or cannot be reached
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"{option} {sparsity} must be in [0, 1)")
    if sparsity > most:
        raise ValueError(
            f"{option} {sparsity} cannot be met, for no Linear is pruned beyond {most}:"
            " give less, or set max_sparsity in a recipe for `absorb prune --recipe`"
        )


def check_samples(samples: int, remedy: str = "") -> None:
    """
    To be asked where an allocation is corrected.

    :param remedy: beside more samples
    :raises ValueError: if there is none to be held out
    """
    if samples < 2:
        raise ValueError(
            f"--samples {samples}: the correction is judged on samples that are held "
            f"out, and there is but one. Give more{remedy}"
        )


def read_model(
    model: str, dtype: Dtype, trust_remote_code: bool, seq_len: int | None = None
) -> tuple[Any, Any]:
    """
    Config and tokenizer. What can be wrong with either, or with the length of a window,
    is found here, before the weights are loaded.

    :param seq_len: tokens per window, where there are any
    """
    from absorb_plugin.evaluation.loading import (
        check_length,
        load_config,
        load_tokenizer,
    )

    config = load_config(model, trust_remote_code)
    if seq_len is not None:
        check_length(config, seq_len)
    _warn_if_slow(config, dtype)
    return config, load_tokenizer(model, trust_remote_code)


def _warn_if_slow(config: Any, dtype: Dtype) -> None:
    """
    :param config: of the model that is about to be loaded in `dtype`
    """
    import torch
    from loguru import logger

    from absorb_plugin.cpu import bfloat16_is_slow

    is_bfloat16 = dtype == "bfloat16" or (
        dtype == "auto" and config.get_text_config().dtype == torch.bfloat16
    )
    if is_bfloat16 and bfloat16_is_slow():
        logger.warning("This CPU has no fast bfloat16: --dtype float32 takes less time")
