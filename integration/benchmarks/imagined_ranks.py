"""
One of several ranks of torch.distributed, the others imagined: what they tell is like
its own. For counts of memory, bytes and operations, not for results.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from absorb_plugin import distributed

__all__ = ["ImaginedRanks", "imagined_ranks"]


class ImaginedRanks:
    """
    In place of torch.distributed, for one rank.

    :param count: of ranks
    :param rank: which one this is
    :ivar received: bytes of tensors that reached this rank, by collective
    """

    def __init__(self, count: int, rank: int = 0) -> None:
        self.count, self.rank = count, rank
        self.received: Counter[str] = Counter()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.count

    def get_backend_config(self) -> str:
        return "cpu:imagined,meta:imagined,fake:imagined"

    def all_gather_object(self, items: list, item: object) -> None:
        items[:] = [item] * self.count

    def broadcast_object_list(self, items: list, **where: object) -> None:
        """The first rank has told them."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.received["all_reduce"] += 2 * tensor.nbytes

    def reduce(self, tensor: torch.Tensor, dst: int) -> None:
        self.received["reduce"] += tensor.nbytes

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self.received["broadcast"] += tensor.nbytes
        if src != self.rank and not tensor.is_meta:
            tensor.zero_()

    def all_gather_single(self, joined: torch.Tensor, own: torch.Tensor) -> None:
        self.received["all_gather"] += joined.nbytes - own.nbytes
        if not joined.is_meta:
            joined.view(self.count, -1).copy_(own)


@contextmanager
def imagined_ranks(count: int, rank: int = 0) -> Iterator[ImaginedRanks]:
    """Within the context this process is one of so many ranks, by default the first."""
    ranks = ImaginedRanks(count, rank)
    with patch.object(distributed, "distributed", ranks):
        yield ranks
