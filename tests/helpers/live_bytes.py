"""Counts the bytes of all tensors that are alive, op by op."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "live_bytes"]


class LiveBytes(TorchDispatchMode):
    """
    :param known: addresses of storages that do not count
    :ivar peak: the most that was alive at once
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self._known = known
        self._alive: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, output)):
            # the head that calibration contexts switch off computes on "meta"
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._known or address in self._alive:
            return
        self._alive[address] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        self._references[address] = weakref.ref(storage, self._forget(address))

    def _forget(self, address: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self.now -= self._alive.pop(address)
            del self._references[address]

        return forget


@contextmanager
def live_bytes(*owners: Any) -> Iterator[LiveBytes]:
    """:param owners: modules or mappings whose tensors do not count"""
    known = set()
    for owner in owners:
        tensors = owner if isinstance(owner, Mapping) else owner.state_dict()
        known |= {t.untyped_storage().data_ptr() for t in tensors.values()}
    with LiveBytes(known) as live:
        yield live
