"""What users hand over as calibration batches, made into tensors that models take."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["as_tensors"]

# Names of what is made of ids, and of a mask of them.
IDS, MASK = "input_ids", "attention_mask"
# Made by a trainer or a generation loop: of all tokens, whichever samples they are of.
OF_NO_SAMPLE = ("cache_position", "num_items_in_batch")
# One entry per token, which llm-compressor's collator does not cut with the ids.
PER_TOKEN = ("position_ids", "special_tokens_mask", "token_type_ids")


def as_tensors(batch: object) -> dict[str, torch.Tensor]:
    """
    Token ids of any integer type as int64, lists and numpy arrays as tensors, one
    sample without a batch dimension as a batch of one; positions that all samples share
    are repeated, and what goes by token is cut where the ids were. What is no number,
    such as the text itself, and single numbers, which are of no sample, are left out.

    :return: "input_ids" of shape (batch, tokens) and whatever else there is
    :raises ValueError: naming the field and the remedy
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a calibration batch is a {type(batch).__name__}: give a dict with "
            "'input_ids' and 'attention_mask', as the model takes them"
        )
    if IDS not in batch:
        raise ValueError(_without_ids(batch))
    ids = _ids(batch[IDS])
    found = {IDS: ids if ids.dim() == 2 else ids[None]}
    for name, value in batch.items():
        tensor = _tensor(value) if name not in (IDS, *OF_NO_SAMPLE) else None
        if tensor is not None and tensor.dim():
            tensor = tensor[None] if ids.dim() == 1 == tensor.dim() else tensor
            found[name] = _of_every_sample(tensor, found[IDS])
            if name in PER_TOKEN and tensor.dim() == 2:
                found[name] = found[name][:, : found[IDS].shape[1]]
    if MASK in found and found[MASK].dim() == 2:
        found[MASK] = _mask(found[MASK], found[IDS])
    return found


def _of_every_sample(tensor: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One row per token that serves all samples of a batch, once for each."""
    if len(tensor) == 1 < len(ids) and tensor.shape[1:] == ids.shape[1:]:
        return tensor.expand_as(ids).clone()
    return tensor


def _without_ids(batch: Mapping[str, Any]) -> str:
    if "inputs_embeds" in batch:
        return (
            "a calibration batch has 'inputs_embeds' and no 'input_ids': losses are of "
            "tokens, and embeddings do not tell which. Give the ids instead"
        )
    return (
        f"a calibration batch has no 'input_ids' but {sorted(batch)}: tokenise the "
        "dataset first"
    )


def _ids(value: object) -> torch.Tensor:
    ids = _tensor(value)
    if ids is None:
        raise ValueError(
            "input_ids of a calibration batch are neither a tensor nor lists of "
            "numbers of equal length: pad the samples, and let the collator make "
            "tensors (transformers' DataCollatorWithPadding)"
        )
    if not ids.numel():
        return ids.long()
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids of a calibration batch are {ids.dtype}: token ids are integers"
        )
    if ids.dim() not in (1, 2):
        raise ValueError(
            f"input_ids of a calibration batch have shape {tuple(ids.shape)}: give "
            "(batch, tokens)"
        )
    ids = ids.long()
    if int(ids.min()) < 0:
        raise ValueError(
            f"input_ids of a calibration batch hold {int(ids.min())}, which is no "
            "token: pad with the tokenizer's pad token and mask it in attention_mask"
        )
    return ids


def _mask(mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask of a calibration batch has shape {tuple(mask.shape)}, "
            f"input_ids {tuple(ids.shape)}: give one entry per token"
        )
    return mask.long()


def _tensor(value: object) -> torch.Tensor | None:
    """Of numbers, on the CPU, and usable outside of inference mode; None if no such."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if not isinstance(value, list | tuple | np.ndarray) or len(value) == 0:
        return None
    if any(isinstance(one, torch.Tensor) for one in value):
        return None  # samples, or as torch's own collator has it, tokens
    try:
        array = np.asarray(value)
    except ValueError:  # of unequal length
        return None
    return torch.as_tensor(array) if array.dtype.kind in "iufb" else None
