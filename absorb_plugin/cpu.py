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
    order. Elsewhere nothing changes.
    """
    if not bfloat16_is_slow():
        yield
        return
    with _ProductsInFloat32():
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
