"""How many weights of a saved Linear are zero, however it is stored."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

__all__ = ["Count", "count_dense", "count_quantized"]

# Rows of stored codes that are compared at a time.
ROWS = 1024


@dataclass(frozen=True)
class Count:
    """
    :param zeros: weights that are exactly zero, dequantised where they are quantised
    :param weights: all of them
    :param finite: whether none is NaN or infinite
    """

    zeros: int
    weights: int
    finite: bool

    @property
    def share(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0


def count_dense(pieces: Iterable[torch.Tensor]) -> Count:
    """:param pieces: of one tensor, any floating dtype"""
    zeros, weights, finite = 0, 0, True
    for piece in pieces:
        if piece.numel():
            zeros += piece.numel() - _nonzeros(piece)
            weights += piece.numel()
            finite = finite and _is_finite(piece)
    return Count(zeros, weights, finite)


def count_quantized(
    tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme, form: str
) -> Count:
    """
    Zeros after dequantisation. Where zero has one code, the codes are compared: the
    same number as by decompression, in a tenth of the time. Anything else is
    decompressed by compressed-tensors.

    :param tensors: local name (`weight` or `weight_packed`, `weight_scale`, ...) ->
        tensor of one Linear
    :param scheme: of its group in `quantization_config`
    :param form: of the checkpoint, as "pack-quantized"
    """
    scale = tensors.get("weight_scale")
    if scale is None or bool((scale.float() == 0).any()):
        codes = None
    else:
        codes = _zero_codes(tensors, scheme)
    if codes is None:
        compressor = BaseCompressor.get_value_from_registry(form)
        return count_dense([compressor.decompress(dict(tensors), scheme)["weight"]])
    assert scale is not None
    zeros, weights, finite = codes
    return Count(zeros, weights, finite and _is_finite(scale))


def _zero_codes(
    tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme
) -> tuple[int, int, bool] | None:
    """(zeros, weights, finite) from the codes, None where zero has no single code."""
    weights = scheme.weights
    if weights is None or not weights.symmetric or "weight_zero_point" in tensors:
        return None
    stored, packed = tensors.get("weight"), tensors.get("weight_packed")
    if stored is not None and stored.dtype == torch.int8:
        return _sum_rows(stored, _zeros_int8), stored.numel(), True
    if stored is not None and stored.dtype == torch.float8_e4m3fn:
        bits = stored.view(torch.uint8)
        return (
            _sum_rows(bits, _zeros_float8),
            stored.numel(),
            not _sum_rows(bits, _nans_float8),
        )
    if packed is not None and packed.dtype == torch.int32 and weights.num_bits == 4:
        count = int(np.prod(tensors["weight_shape"].tolist()))
        return _sum_rows(packed, _zeros_int4), count, True
    return None


def _sum_rows(codes: torch.Tensor, count: Callable[[np.ndarray], int]) -> int:
    return sum(count(rows.numpy()) for rows in codes.split(ROWS))


def _zeros_int8(codes: np.ndarray) -> int:
    return codes.size - int(np.count_nonzero(codes))


def _zeros_float8(codes: np.ndarray) -> int:
    return codes.size - int(np.count_nonzero(codes & 0x7F))  # 0x80 is -0.0


def _nans_float8(codes: np.ndarray) -> int:
    return int(np.count_nonzero((codes & 0x7F) == 0x7F))


def _zeros_int4(words: np.ndarray) -> int:
    """
    Eight codes in a word, each 8 above its value. Padding has the code 0, that is the
    value -8, and is not counted.
    """
    values = words.view(np.uint32) ^ np.uint32(0x88888888)
    values |= values >> np.uint32(2)
    values |= values >> np.uint32(1)
    values &= np.uint32(0x11111111)  # one bit for each that is not zero
    return 8 * words.size - int(np.bitwise_count(values).sum())


def _nonzeros(tensor: torch.Tensor) -> int:
    if tensor.dtype not in (torch.bfloat16, torch.float16):
        return int(tensor.count_nonzero())
    # without the sign's bit, and in numpy, several times faster
    codes = tensor.contiguous().view(torch.int16).numpy() & 0x7FFF
    return int(np.count_nonzero(codes))


def _is_finite(tensor: torch.Tensor) -> bool:
    """NaN and infinity both come through minimum and maximum."""
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    low, high = wide.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
