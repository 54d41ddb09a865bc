"""Weights that compressed-tensors has compressed in memory, as `oneshot` does."""

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.utils import get_direct_state_dict

__all__ = ["dense_weight"]


def dense_weight(linear: torch.nn.Linear) -> torch.Tensor:
    """
    The weight, dequantised where it is compressed.

    :raises ValueError: if it is packed in another way
    """
    scheme: Any = getattr(linear, "quantization_scheme", None)
    status = getattr(linear, "quantization_status", None)
    # a scheme may be of inputs alone
    of_weights = getattr(scheme, "weights", None) is not None
    if of_weights and status == QuantizationStatus.COMPRESSED:
        compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
        return compressor.decompress(get_direct_state_dict(linear), scheme)["weight"]
    if not hasattr(linear, "weight"):
        raise ValueError(
            "the model's Linears hold packed weights, whose zeros cannot be counted"
        )
    return linear.weight
