"""
torch.distributed as NCCL has it, by gloo: tensors lie on the rank's own card, in one
piece, are of a dtype that NCCL knows, and all ranks bring the same shapes. What a
collective leaves undefined is made NaN.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed

from helpers.fake_accelerator import fake_accelerator, on_host

__all__ = ["CARD", "strict_collectives"]

CARD = torch.device("fake:0")
KNOWN = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
KNOWN |= {torch.uint8, torch.int8, torch.int32, torch.int64}


class _Strict:
    """:ivar tensors: that went over the process group"""

    def __init__(self) -> None:
        self.tensors = 0
        self._plain = {name: getattr(distributed, name) for name in self.replaced()}
        self._compare = distributed.all_gather_object

    def replaced(self) -> dict[str, Any]:
        gathers = ("all_gather_single", "all_gather_into_tensor")
        return {
            "all_reduce": self.all_reduce,
            "reduce": self.reduce,
            "broadcast": self.broadcast,
            "broadcast_object_list": self.broadcast_object_list,
        } | {n: self.all_gather for n in gathers if hasattr(distributed, n)}

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._plain["all_reduce"](self._checked("all_reduce", tensor))

    def reduce(self, tensor: torch.Tensor, dst: int) -> None:
        there = self._checked("reduce", tensor)
        self._plain["reduce"](there, dst=dst)
        if distributed.get_rank() != dst:
            there.fill_(torch.nan)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self._plain["broadcast"](self._checked("broadcast", tensor), src=src)

    def broadcast_object_list(
        self, items: list, src: int, device: torch.device = CARD
    ) -> None:
        assert device == CARD
        self._plain["broadcast_object_list"](items, src=src)

    def all_gather(self, joined: torch.Tensor, own: torch.Tensor) -> None:
        there = self._checked("all_gather", own)
        assert joined.device == CARD and joined.is_contiguous()
        assert joined.numel() == own.numel() * distributed.get_world_size()
        self._plain["all_gather_into_tensor"](on_host(joined), there)

    def _checked(self, what: str, tensor: torch.Tensor) -> torch.Tensor:
        """:return: its data"""
        assert tensor.device == CARD, f"{what}: a tensor on {tensor.device}"
        assert tensor.is_contiguous(), f"{what}: strides {tensor.stride()}"
        assert tensor.dtype in KNOWN, f"{what}: {tensor.dtype}"
        said: list[Any] = [None] * distributed.get_world_size()
        self._compare(said, (what, tensor.shape, tensor.dtype))
        assert said == said[:1] * len(said), f"the ranks bring {said}"
        self.tensors += 1
        return on_host(tensor)


@contextmanager
def strict_collectives() -> Iterator[_Strict]:
    """Within the context this rank has a card of its own, and strict collectives."""
    strict = _Strict()
    with ExitStack() as stack:
        stack.enter_context(fake_accelerator())
        for name, function in strict.replaced().items():
            stack.enter_context(patch.object(distributed, name, function))
        backend = {"get_backend_config": lambda *_: "fake:nccl"}
        stack.enter_context(patch.multiple(distributed, **backend))
        yield strict
