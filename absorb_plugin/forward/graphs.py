"""
Graphs of autograd that blocks leave behind, kept from the forward to the backward pass
while there is room: such a block need not run again for its backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import Module

from absorb_plugin.devices import is_offloaded

__all__ = ["KeptGraphs"]


class KeptGraphs:
    """
    The graphs of one batch.

    :param room: bytes that they may take; the one that passes it is not kept

    Attributes:
        bytes: that those take which are kept
        tried: whether any block has run so
    """

    def __init__(self, room: int) -> None:
        self._room, self.bytes, self.tried = room, 0, False
        self._recorded = 0

    def may_keep(self, block: Module) -> bool:
        """
        Not of one that is offloaded: it is onloaded again for the backward pass, and
        what autograd holds on to would stay.
        """
        return self._room > 0 and not any(map(is_offloaded, block.modules()))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """
        Within the context what a block runs is differentiated, and what autograd holds
        on to is counted.
        """
        self.tried, self._recorded, seen = True, 0, set[int]()

        def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                self._recorded += storage.nbytes()
            # what an operation puts out would hold itself, and never be let go
            return tensor.detach(), tensor._version

        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, _unpacked),
        ):
            yield

    def keep(self) -> bool:
        """Whether the one just recorded may be kept; if not, none after it."""
        if self.bytes + self._recorded > self._room:
            self._room = 0
            return False
        self.bytes += self._recorded
        return True


def _unpacked(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
    """As autograd checks where it has no hooks."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that a block's gradient needs "
            "has been modified by an inplace operation"
        )
    return tensor
