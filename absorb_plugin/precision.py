"""
Float32 that is float32, whatever a script has allowed for speed, and float64 where
there is any.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

__all__ = ["gram", "ieee_float32", "reduced_precision", "widest_float"]

# What computes float32 products, each with a setting of its own since torch 2.9.
BACKENDS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul if hasattr(torch.backends.mkldnn, "matmul") else None,
    getattr(torch.backends.cudnn, "conv", None),
    getattr(torch.backends.cudnn, "rnn", None),
)
# Features whose products are made at once, at least.
BAND = 256
# What a 16-bit product may be rounded to on its way, by name in torch.backends.
REDUCED = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextmanager
def ieee_float32() -> Iterator[None]:
    """
    Within the context float32 products are neither TF32 nor bfloat16, which
    `torch.set_float32_matmul_precision("high")` and convolutions by default allow: we
    factor Hessians and measure rounding against float32. Afterwards all is as it was.
    """
    overall, single = _overall(), [_get(backend) for backend in BACKENDS]
    cudnn = _cudnn()
    try:
        torch.set_float32_matmul_precision("highest")
        if cudnn is not None:
            # or torch refuses to say what it is, as `torch.backends.cudnn.flags` asks
            torch.backends.cudnn.allow_tf32 = False
        for backend in BACKENDS:
            _set(backend, "ieee")
        yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for backend, precision in zip(BACKENDS, single, strict=True):
            _set(backend, precision)


@cache
def widest_float(device: torch.device) -> torch.dtype:
    """
    To add up in: float64, or float32 on a device that has nothing wider, as those of
    Apple and some of Intel.
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except torch.OutOfMemoryError:  # says nothing about the device for good
        raise
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def gram(x: torch.Tensor) -> torch.Tensor:
    """
    Σ x xᵀ over tokens, in float32 of shape (features, features).

    Products of two bfloat16 numbers are exact in float32, so units for 16 bits that add
    up in float32 give what float32 units would, several times as fast.

    :param x: (tokens, features)
    """
    if x.dtype == torch.bfloat16 and _adds_up_wide(x.device):
        return torch.mm(x.t(), x, out_dtype=torch.float32)
    wide = x.float()
    features = wide.shape[1]
    width = max(BAND, features // 8)
    found = wide.new_empty(features, features)
    for start in range(0, features, width):  # what lies below the diagonal is known
        band = slice(start, start + width)
        torch.mm(wide[:, band].t(), wide[:, start:], out=found[band, start:])
        found[start + width :, band] = found[band, start + width :].t()
    return found


@cache
def _adds_up_wide(device: torch.device) -> bool:
    """Whether it has a product of bfloat16 with sums and result in float32."""
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def reduced_precision() -> dict[str, Any]:
    """Settings that change the digits of a measurement, for the cache's key."""
    matmul = torch.backends.cuda.matmul
    found = {name: str(getattr(matmul, name, None)) for name in REDUCED}
    return found | {"deterministic": torch.are_deterministic_algorithms_enabled()}


def _overall() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses where backends were set one by one
        return None


def _cudnn() -> bool | None:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # likewise
        return None


def _get(backend: Any) -> str | None:
    return getattr(backend, "fp32_precision", None)


def _set(backend: Any, precision: str | None) -> None:
    if precision is not None and _get(backend) is not None:
        backend.fp32_precision = precision
