"""
What the ranks of torch.distributed tell each other; without a process group, nothing.

Every rank calls these functions in the same order: they are collectives. The ranks
share out the samples of a run (`share`), and what they measured is put together
where a result is read (`add`, `gather_shares`), as sums and counts that are divided
last. Decisions are those of the first rank (`from_first`): ranks of unequal hardware
must not part ways over a last digit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from loguru import logger
from torch import distributed

from absorb_plugin.precision import widest_float

__all__ = [
    "active",
    "add",
    "add_to",
    "broadcast",
    "collective_device",
    "fail_together",
    "from_first",
    "gather",
    "gather_shares",
    "is_first",
    "rank",
    "ranks",
    "share",
]

T = TypeVar("T")


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


def add_to(
    tensor: torch.Tensor | None, shape: torch.Size, target: int
) -> torch.Tensor | None:
    """
    Sum over the ranks, on one of them.

    :param tensor: summand of `shape` in float32; None counts as zeros
    :param target: the rank that gets the sum
    :return: there the sum, on the device of its summand (if it has none, where
        collectives run), on the others None
    """
    device = collective_device()
    total = torch.zeros(shape, device=device)
    if tensor is not None:
        total = tensor.to(device)
    distributed.reduce(total, dst=target)
    if rank() != target:
        return None
    return total if tensor is None else total.to(tensor.device)


def broadcast(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """
    :param tensor: on all ranks of the shape and dtype of the source's
    :return: a copy of the source's, on the device of `tensor`
    """
    received = tensor.detach().to(collective_device(), copy=True).contiguous()
    distributed.broadcast(received.view(torch.uint8), src=source)  # of any dtype
    return received.to(tensor.device)


@contextmanager
def fail_together() -> Iterator[None]:
    """
    What fails in here on one rank fails on all, where otherwise they would wait for it
    until a timeout. No collective may run inside.

    The rank that failed says so before it tells the others, for after an error of its
    device that may fail as well.

    :raises RuntimeError: on the other ranks, naming the one that failed and why
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
        if active():
            logger.error(f"rank {rank()} of torch.distributed failed: {caught!r}")
    try:
        said = gather(None if error is None else f"{type(error).__name__}: {error}")
    finally:
        if error is not None:
            raise error
    for number, message in enumerate(said):
        if message is not None:
            raise RuntimeError(f"rank {number} of torch.distributed failed: {message}")


def collective_device() -> torch.device:
    """Where tensors must be to go over the process group: NCCL takes no CPU tensors."""
    if "cpu:" in distributed.get_backend_config():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
