"""What CPUs are slow at: bfloat16 without instructions for it, and fresh memory."""

import contextlib
import ctypes
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["bfloat16_is_slow", "fast_bfloat16", "keep_freed_memory"]

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


# Times as long as a product in float32 that one in bfloat16 may take.
BEARABLE = 1.25
SIDE, REPETITIONS = 512, 5
# Tokens up to which attention by products takes less time than torch's fused one, and
# scores that a processor's cache holds.
SHORT, CACHED = 512, 2**20


def bfloat16_is_slow() -> bool:
    """
    Whether models run on a CPU that takes longer for matrix products of bfloat16 than
    for those of float32: on x86 without AVX-512 several times as long, and on some that
    have its bfloat16 instructions, but no AMX, twice as long. Tried out once.
    """
    if torch.accelerator.is_available():
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return True
    return _times_as_long() > BEARABLE


@functools.cache
def _times_as_long() -> float:
    """As products in float32 those in bfloat16 take."""
    wide = torch.ones(SIDE, SIDE, device="cpu", dtype=torch.float32)
    short = wide.bfloat16()
    seconds: dict[torch.dtype, list[float]] = {wide.dtype: [], short.dtype: []}
    with torch.inference_mode():
        for _ in range(REPETITIONS):
            for one in (wide, short):
                begin = time.perf_counter()
                torch.nn.functional.linear(one, one)
                seconds[one.dtype].append(time.perf_counter() - begin)
    return min(seconds[short.dtype]) / min(seconds[wide.dtype])


@contextlib.contextmanager
def fast_bfloat16() -> Iterator[None]:
    """
    Where bfloat16 is slow, compute each matrix product of bfloat16 tensors in float32
    and round its result to bfloat16. That is what bfloat16 hardware does (products are
    summed in float32), so activations carry the same rounding, sums apart in their
    order. On a CPU where it is not, attention is computed by products; on accelerators
    nothing changes.
    """
    if torch.accelerator.is_available():
        yield
        return
    with _ProductsInFloat32() if bfloat16_is_slow() else _AttentionByProducts():
        yield


class _ProductsInFloat32(TorchFunctionMode):
    PRODUCTS = (
        torch.nn.functional.linear,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
    )

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.PRODUCTS and "out" not in kwargs:
            # a bias may be None
            tensors = [
                tensor for tensor in (*args, *kwargs.values()) if tensor is not None
            ]
            if all(_is_cpu_bfloat16(tensor) for tensor in tensors):
                wide = [None if tensor is None else tensor.float() for tensor in args]
                named = {
                    name: None if tensor is None else tensor.float()
                    for name, tensor in kwargs.items()
                }
                return func(*wide, **named).bfloat16()
        return func(*args, **kwargs)


class _AttentionByProducts(TorchFunctionMode):
    """
    Attention of short windows of bfloat16 as two products and a softmax between them,
    rounded as where a model is set to eager attention. On a CPU torch's fused one takes
    two to three times as long, forward and backward.
    """

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            found = _attention(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """As of torch; None for what is left to it."""
    tensors = (query, key, value)
    if not all(_is_cpu_bfloat16(x) and x.dim() == 4 for x in tensors) or dropout_p:
        return None
    samples, heads, tokens, size = query.shape
    others, seen = key.shape[1:3]
    if max(tokens, seen) > SHORT or (heads != others and not enable_gqa):
        return None
    if is_causal:
        attn_mask = query.new_ones(tokens, seen, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        nowhere = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = nowhere.masked_fill_(~attn_mask, -torch.inf)
    if attn_mask is not None and not (attn_mask > -torch.inf).any(-1).all():
        return None  # who sees nothing has no softmax
    query = query * (size**-0.5 if scale is None else scale)
    at_once = max(1, CACHED // (heads * tokens * seen))
    masks = [attn_mask] * -(-samples // at_once)
    if attn_mask is not None and attn_mask.dim() == 4 and len(attn_mask) > 1:
        masks = list(attn_mask.split(at_once))
    parts = zip(*(x.split(at_once) for x in (query, key, value)), masks, strict=True)
    return torch.cat([_attended(*part) for part in parts])


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """:param mask: added to the scores"""
    samples, heads, tokens, size = query.shape
    # queries that share a key are rows of one matrix
    scores = query.reshape(samples, key.shape[1], -1, size) @ key.transpose(2, 3)
    if mask is not None:
        scores = scores.view(samples, heads, tokens, -1) + mask.to(query.dtype)
    shares = scores.softmax(-1).view(samples, key.shape[1], -1, key.shape[2])
    return (shares @ value).view(samples, heads, tokens, -1)


def _is_cpu_bfloat16(tensor: object) -> bool:
    # exactly tensors: tracing passes proxies through here
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype == torch.bfloat16
        and tensor.device.type == "cpu"
    )


def keep_freed_memory() -> None:
    """
    For a process of one's own, on Linux: hand freed memory out again instead of
    returning it to the system. Large tensors come and go by the hundred here, and the
    pages of each new one would be zeroed first, which takes half of the time of a
    forward in bfloat16.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
