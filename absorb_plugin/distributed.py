"""
What the ranks of torch.distributed tell each other; without a process group, nothing.

Every rank calls these functions in the same order: they are collectives. The ranks
share out the samples of a run (`share`), and what they measured is put together
where a result is read (`add`, `gather_shares`), as sums and counts that are divided
last. Where they also share the work on weights (`row_share`), they pass block after
block in step (`meet`). Decisions are those of the first rank (`from_first`): ranks of
unequal hardware must not part ways over a last digit.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from loguru import logger
from torch import distributed

from absorb_plugin.precision import widest_float

__all__ = [
    "OtherRankFailed",
    "active",
    "add",
    "add_to",
    "add_up",
    "broadcast",
    "broadcast_in_place",
    "collective_device",
    "fail_together",
    "from_first",
    "gather",
    "gather_shares",
    "is_first",
    "join_rows",
    "main_device",
    "meet",
    "rank",
    "ranks",
    "row_share",
    "share",
    "tell_out_of_memory",
]

T = TypeVar("T")
# Set on an error that the other ranks have been told of.
TOLD = "_told_to_all_ranks"
# torch 2.13 has a new name for it
_NEW, _OLD = "all_gather_single", "all_gather_into_tensor"


class OtherRankFailed(RuntimeError):
    """
    Another rank failed, and has told so.

    :param again: whether a batch does not fit its device, so that all try it again
    """

    def __init__(self, message: str, again: bool) -> None:
        super().__init__(message)
        self.again = again


@dataclass(frozen=True)
class _News:
    """What a rank tells the others within `fail_together`."""

    item: Any = None
    error: str | None = None
    again: bool = False


def active() -> bool:
    """Whether there is a process group."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if active() else 0


def ranks() -> int:
    return distributed.get_world_size() if active() else 1


def is_first() -> bool:
    """Whether this rank decides, writes files and calls the hooks of outsiders."""
    return rank() == 0


def gather(item: T) -> list[T]:
    """
    :param item: anything that can be pickled; tensors on the CPU
    :return: the item of every rank, in their order, the same on all of them
    """
    if not active():
        return [item]
    items: list[Any] = [None] * ranks()
    distributed.all_gather_object(items, item)
    return items


def from_first(item: T) -> T:
    """The first rank's item, on all ranks."""
    if not active():
        return item
    items = [item]
    distributed.broadcast_object_list(items, src=0, device=collective_device())
    return items[0]


def share(items: Sequence[T]) -> list[T]:
    """
    This rank's part of items that all ranks hold alike: every n-th, so that the parts
    differ by one item at most, and long samples, which stand together, are spread.
    """
    return list(items[rank() :: ranks()])


def gather_shares(items: Sequence[T]) -> list[T]:
    """
    Undo `share`.

    :param items: one per item of this rank's share, in its order
    :return: one per item of the whole, in its order, the same on all ranks
    """
    parts = gather(list(items))
    longest = max(len(part) for part in parts)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def add(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Sums over the ranks, in float64 where the device has it.

    :param tensors: name -> summand; a rank may lack names that others have
    :return: name -> sum, for the names of all ranks, in dtype and on the device of this
        rank's summand (float32, where collectives run, if it has none)
    """
    if not active():
        return dict(tensors)
    parts = gather({name: tensor.shape for name, tensor in tensors.items()})
    shapes = {name: shape for part in parts for name, shape in part.items()}
    device = collective_device()
    sums = {}
    for name, shape in shapes.items():
        total = torch.zeros(shape, dtype=widest_float(device), device=device)
        mine = tensors.get(name)
        if mine is not None:
            total += mine.to(device)
        distributed.all_reduce(total)
        sums[name] = total.float() if mine is None else total.to(mine)
    return sums


def add_to(tensor: torch.Tensor, target: int) -> torch.Tensor | None:
    """
    Sum over the ranks, on one of them.

    :param tensor: summand in float32, on all ranks of one shape and kind of device.
        What it holds afterwards is undefined
    :param target: the rank that gets the sum
    :return: there the sum, on the device of its summand, on the others None
    """
    total = tensor.to(_device_for(tensor))
    distributed.reduce(total, dst=target)
    return total.to(tensor.device) if rank() == target else None


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """
    Sum over the ranks, on all of them.

    :param tensor: summand, as of `add_to`
    """
    total = tensor.to(_device_for(tensor))
    distributed.all_reduce(total)
    return total.to(tensor.device)


def broadcast(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """
    :param tensor: on all ranks of the shape and dtype of the source's
    :return: a copy of the source's, on the device of `tensor`
    """
    received = tensor.detach().clone(memory_format=torch.contiguous_format)
    broadcast_in_place(received, source)
    return received


def broadcast_in_place(tensor: torch.Tensor, source: int) -> None:
    """:param tensor: contiguous, on all ranks of the shape and dtype of the source's"""
    moved = tensor.detach().to(_device_for(tensor))
    distributed.broadcast(_bytes(moved), src=source)
    if moved.device != tensor.device:
        tensor.copy_(moved)


def row_share(rows: int) -> slice:
    """
    This rank's rows of a matrix: as many as any other's, but for the last ranks'.
    """
    size = -(-rows // ranks())
    return slice(min(rows, rank() * size), min(rows, (rank() + 1) * size))


def join_rows(parts: Sequence[torch.Tensor], rows: Sequence[int]) -> list[torch.Tensor]:
    """
    Matrices of which each rank has its `row_share`. Within `fail_together`.

    :param parts: this rank's, each (its rows, columns)
    :param rows: of the whole, of each
    :return: the whole matrices, each where its part is
    """
    if ranks() == 1:
        return list(parts)
    # all memory is there before the others wait for this rank
    pieces = []
    for part, count in zip(parts, rows, strict=True):
        size = -(-count // ranks())
        own = part.detach().to(_device_for(part)).contiguous()
        if len(own) < size:
            own = torch.cat([own, own.new_zeros(size - len(own), own.shape[1])])
        pieces.append((own, own.new_empty(size * ranks(), own.shape[1])))
    meet()
    for own, joined in pieces:
        _all_gather(_bytes(joined), _bytes(own))
    return [
        joined[:count].to(part.device)
        for (_, joined), part, count in zip(pieces, parts, rows, strict=True)
    ]


@contextmanager
def fail_together() -> Iterator[None]:
    """
    What fails in here on one rank fails on all, where otherwise they would wait for it
    until a timeout. Inside only `meet`, and collectives right after it, that nothing
    can keep a rank from.

    The rank that failed says so before it tells the others, for after an error of its
    device that may fail as well. One of these contexts may lie within another.

    :raises OtherRankFailed: on the other ranks, naming the one that failed and why
    """
    handled = sys.exc_info()[1]  # as by who tries again, after all ranks failed
    try:
        yield
    except Exception as error:
        if _is_told(error, handled):
            raise
        if active():
            logger.error(f"rank {rank()} of torch.distributed failed: {error!r}")
        with suppress(Exception):  # a class may refuse it
            setattr(error, TOLD, True)
        try:
            gather(_News(error=f"{type(error).__name__}: {error}"))
        finally:
            raise error
    meet()


def _is_told(error: BaseException | None, handled: BaseException | None) -> bool:
    """
    Whether all ranks know of an error, or of what it came from.

    :param handled: one that was there before, and with which it has nothing to do
    """
    if error is None or error is handled:
        return False
    told = isinstance(error, OtherRankFailed) or hasattr(error, TOLD)
    return told or _is_told(error.__cause__ or error.__context__, handled)


def meet(item: T | None = None) -> list[T]:
    """
    Within `fail_together`: what every rank tells the others, once all have come here.

    :param item: as of `gather`
    :raises OtherRankFailed: if one failed on its way
    """
    return [news.item for news in _exchange(_News(item))]


def tell_out_of_memory(said: str) -> None:
    """
    Within `fail_together`, in place of the next `meet`: a batch does not fit this
    rank's device, and all try it again.

    :raises OtherRankFailed: if another has failed for good
    """
    _exchange(_News(error=said, again=True))


def _exchange(news: _News) -> list[_News]:
    found = gather(news)
    failed = [n for n, one in enumerate(found) if one.error is not None]
    failed.sort(key=lambda n: found[n].again)  # those that failed for good first
    # who does not fit its device either is told nothing new
    if failed and not (news.again and found[failed[0]].again):
        first = found[failed[0]]
        message = f"rank {failed[0]} of torch.distributed failed: {first.error}"
        raise OtherRankFailed(message, first.again)
    return found


def collective_device() -> torch.device:
    """Where tensors must be to go over the process group: NCCL takes no CPU tensors."""
    if "cpu:" in distributed.get_backend_config():
        return torch.device("cpu")
    return main_device()


def main_device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _all_gather(joined: torch.Tensor, own: torch.Tensor) -> None:
    getattr(distributed, _NEW if hasattr(distributed, _NEW) else _OLD)(joined, own)


def _device_for(tensor: torch.Tensor) -> torch.device:
    """Where a tensor must be to go over the process group: where it is, if it can."""
    if f"{tensor.device.type}:" in distributed.get_backend_config():
        return tensor.device
    return collective_device()


def _bytes(matrix: torch.Tensor) -> torch.Tensor:
    """Of any dtype, for not all are known to all process groups."""
    # of one entry the stride may be any
    return matrix.view(-1).as_strided((matrix.numel(),), (1,)).view(torch.uint8)
