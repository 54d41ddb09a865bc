"""
Counts what a GPU would do, op by op, on tensors without memory (device "meta").

The time of an op is the longest of: a launch, its arithmetic, its traffic, or its
sorting and selecting, each by a stated rate. Nothing here was measured on a GPU.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["RATES", "Cost", "Rates", "Trace", "tracing"]


@dataclass(frozen=True)
class Rates:
    """
    Of one H100 SXM with 80 GB, as it may be hoped for in plain PyTorch; not measured.
    Those of sorting and selecting are the least certain.
    """

    half: float = 400e12  # FLOP/s of 16-bit products
    single: float = 45e12  # FLOP/s of float32 products without TF32
    factor: float = 20e12  # FLOP/s of Cholesky factors and triangular solves
    traffic: float = 2.6e12  # B/s of device memory
    launch: float = 6e-6  # s, host and device
    sort: float = 3.5e9  # elements/s of a sort of keys and indices
    select: float = 5e9  # elements/s of kthvalue, a row per thread block
    bus: float = 10e9  # B/s from pageable host memory
    locked: float = 40e9  # B/s through page-locked memory, one tensor after another
    link: float = 200e9  # B/s that a GPU receives of the others of its node


RATES = Rates()
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "addr_", "dot")
FREE = ("empty", "empty_strided", "new_empty", "empty_like", "detach", "lift_fresh")
aten = torch.ops.aten


@dataclass
class Cost:
    """
    :param count: "launches", "syncs", "FLOP", "bytes", "sorted", "selected"
    :param seconds: by what takes the time: "launches", "products", "factors",
        "traffic", "sorts", "selections", "links"
    :param peak: bytes alive at once, of what was not there before
    """

    count: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    peak: int = 0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def copy(self) -> "Cost":
        return Cost(Counter(self.count), Counter(self.seconds), self.peak)

    def add(self, other: "Cost") -> None:
        """In place, but for the peak."""
        self.count.update(other.count)
        self.seconds.update(other.seconds)

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """The sum; negative `times` take away."""
        both = self.copy()
        for mine, theirs in (
            (both.count, other.count),
            (both.seconds, other.seconds),
        ):
            for key, value in theirs.items():
                mine[key] += value * times
        both.peak = max(self.peak, other.peak)
        return both


class Trace(TorchDispatchMode):
    """
    :param known: addresses of storages that were there before
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.cost = Cost()
        self._known, self._now = known, 0
        self._masks = Masks()
        self._alive: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._local_scalar_dense.default:
            self.cost.count["syncs"] += 1
            mask = self._masks.of(args[0])
            return _scalar(args[0]) if mask is None else mask.item()
        output = _run(func, args, kwargs, self._masks)
        self._masks.follow(func, args, kwargs, output)
        inputs = [x for x in tree_leaves((args, kwargs)) if _is_meta(x)]
        outputs = [x for x in tree_leaves(output) if _is_meta(x)]
        name = _name(func)
        if outputs and name not in FREE and not _is_view(func):
            self._count(name, inputs, outputs)
        for tensor in (*inputs, *outputs):
            self._keep(tensor.untyped_storage())
        return output

    def _count(
        self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        count, seconds = self.cost.count, self.cost.seconds
        traffic = sum(map(_bytes, (*inputs, *outputs)))
        count["launches"] += 1
        count["bytes"] += traffic
        times = {"launches": RATES.launch, "traffic": traffic / RATES.traffic}
        if name in PRODUCTS:
            flops = _product(name, inputs, outputs[0])
            count["FLOP"] += flops
            narrow = all(x.element_size() == 2 for x in inputs)
            times["products"] = flops / (RATES.half if narrow else RATES.single)
        elif name == "linalg_cholesky_ex":
            times["factors"] = inputs[0].shape[-1] ** 3 / 3 / RATES.factor
        elif name == "linalg_solve_triangular":
            times["factors"] = outputs[0].numel() * inputs[0].shape[-1] / RATES.factor
        elif name == "cholesky_inverse":
            times["factors"] = inputs[0].shape[-1] ** 3 / RATES.factor
        elif name == "sort":
            count["sorted"] += inputs[0].numel()
            times["sorts"] = inputs[0].numel() / RATES.sort
        elif name == "kthvalue":
            count["selected"] += inputs[0].numel()
            times["selections"] = inputs[0].numel() / RATES.select
        longest = max(times, key=lambda key: times[key])
        seconds[longest] += times[longest]

    def _keep(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._known or address in self._alive:
            return
        self._alive[address] = storage.nbytes()
        self._now += storage.nbytes()
        self.cost.peak = max(self.cost.peak, self._now)
        self._references[address] = weakref.ref(storage, self._forget(address))

    def _forget(self, address: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self._now -= self._alive.pop(address)
            self._masks.forget(address)
            del self._references[address]

        return forget


class Masks:
    """
    Contents of the boolean tensors on "meta" that follow from shapes alone, as which
    tokens of a batch count. What a comparison of numbers gives is not known.
    """

    def __init__(self) -> None:
        # address of a storage -> its elements on the CPU; views look at the same
        self._elements: dict[int, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """On the CPU, where it is known."""
        if not tensor.is_meta or tensor.dtype != torch.bool:
            return None
        elements = self._elements.get(tensor.untyped_storage()._cdata)
        if elements is None:
            return None
        return elements.as_strided(
            tensor.size(), tensor.stride(), tensor.storage_offset()
        )

    def follow(
        self, func: Any, args: Sequence, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """What an operation makes of them."""
        if not _is_meta(output) or output.dtype != torch.bool or _is_view(func):
            return
        address = output.untyped_storage()._cdata
        inputs = [x for x in tree_leaves((args, kwargs)) if _is_meta(x)]
        if func in (aten.ones_like.default, aten.new_ones.default):
            found = torch.ones(output.shape, dtype=torch.bool)
        elif _name(func) in FREE or any(self.of(x) is None for x in inputs):
            self.forget(address)
            return
        else:
            here = {"device": "cpu"} if "device" in kwargs else {}
            found = func(*self._here(args), **self._here(kwargs) | here)
        if output is not args[0]:  # else done in place, where the elements are
            size = output.untyped_storage().nbytes()
            self._elements[address] = torch.empty(size, dtype=torch.bool)
            self.of(output).copy_(found)

    def forget(self, address: int) -> None:
        """Of a storage that is gone, or of whose contents nothing is known."""
        self._elements.pop(address, None)

    def _here(self, values: Any) -> Any:
        return tree_map(lambda x: self.of(x) if _is_meta(x) else x, values)


@contextmanager
def tracing(*owners: Mapping[str, torch.Tensor]) -> Iterator[Cost]:
    """
    Within the context everything on "meta" is counted.

    :param owners: tensors that do not count as alive
    """
    known = {x.untyped_storage()._cdata for owner in owners for x in owner.values()}
    trace = Trace(known)
    with ExitStack() as stack:
        for name, value in (("tolist", _listed), ("cpu", _on_cpu)):
            original = getattr(torch.Tensor, name)
            replacement = _meta_only(original, value, trace.cost)
            stack.enter_context(patch.object(torch.Tensor, name, replacement))
        stack.enter_context(trace)
        yield trace.cost


def _meta_only(original: Callable, value: Callable, cost: Cost) -> Callable:
    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_meta:
            return original(self, *args, **kwargs)
        cost.count["syncs"] += 1
        return value(self)

    return method


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")


def _listed(tensor: torch.Tensor) -> list:
    return _on_cpu(tensor).tolist()


def _run(func: Any, args: Sequence, kwargs: dict[str, Any], masks: Masks) -> Any:
    """As meta tensors cannot: by a mask, and by one that is not known all is picked."""
    if func is aten.index.Tensor and _masked(args[1]):
        mask = args[1][0]
        known = masks.of(mask)
        # thresholds between quantiles look at all of a matrix and cut it themselves
        picked = mask.numel() if known is None else int(known.sum())
        return args[0].new_empty((picked, *args[0].shape[mask.dim() :]))
    if func in (aten.index_put_.default, aten._index_put_impl_.default) and _masked(
        args[1]
    ):
        return args[0]
    if func is aten._to_copy.default and args[0].is_meta:
        kwargs["device"] = args[0].device  # what goes to the host stays without data
    if func is aten.nonzero.default and args[0].is_meta:
        return torch.zeros(0, args[0].dim(), dtype=torch.long)
    return func(*args, **kwargs)


def _masked(indices: Sequence[torch.Tensor | None]) -> bool:
    return any(x is not None and x.is_meta and x.dtype == torch.bool for x in indices)


def _scalar(tensor: torch.Tensor) -> float | int | bool:
    """Of a tensor without data: finite, true, and not zero."""
    if not tensor.is_meta:
        return aten._local_scalar_dense.default(tensor)
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _product(name: str, inputs: list[torch.Tensor], output: torch.Tensor) -> int:
    if name == "addr_":
        return 2 * output.numel()
    left = inputs[1] if name.startswith(("add", "badd")) else inputs[0]
    return 2 * output.numel() * left.shape[-1]


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _is_view(func: Any) -> bool:
    return any(
        x.alias_info is not None and not x.alias_info.is_write
        for x in func._schema.returns
    )


def _bytes(tensor: torch.Tensor) -> int:
    """What an op moves of it: an expanded tensor is read once."""
    return min(
        tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    )
