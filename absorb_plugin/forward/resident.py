"""
Offloaded weights that stay on the accelerator from one forward to the next.

An allocation runs dozens of forwards of few tokens, and offloaded weights are onloaded
in every one of them, for most of its time (docs/scaling.md). So as many blocks as the
device has room for beside a probe are onloaded once, and what is outside of them with
them; the others come through page-locked memory. The room is given back for a probe
that passes its limit, and where a batch does not fit.
"""

from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from compressed_tensors.offload import get_execution_device
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.offload.utils import to_tensor
from loguru import logger
from torch.nn import Linear, Module
from transformers import PreTrainedModel

from absorb_plugin import distributed
from absorb_plugin.blocks import outside
from absorb_plugin.devices import (
    free_memory,
    give_back_page_locked,
    is_offloaded,
    through_page_locked,
)
from absorb_plugin.torch_state import stored

__all__ = ["kept_onloaded", "own_rows", "release", "room", "spare"]

# Of what is free, left alone: memory is not handed out without gaps.
RESERVE = 0.1


class Kept(OffloadCache):
    """
    Parameters or buffers of a module, onloaded at first use and kept until `release`.

    :param cache: as the module had them
    :param onloaded: what is on the device, by what lies elsewhere; of all modules, for
        weights may be tied
    :param keeps: whether they stay
    :param keeps_rows: whether what `rows` gives stays
    """

    offload_device: torch.device | str

    def __init__(
        self,
        cache: OffloadCache,
        onloaded: dict[torch.Tensor, torch.Tensor],
        keeps: bool,
        keeps_rows: bool = False,
    ) -> None:
        super().__init__(cache.onload_device)
        self.offload_device = cache.offload_device
        self.offloaded_values = cache.offloaded_values
        self.cache = cache
        self.keeps, self.keeps_rows = keeps, keeps_rows
        self._onloaded = onloaded
        self._rows: dict[torch.Tensor, torch.Tensor] = {}

    def onload(self, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        if offloaded is None:
            return None
        if not self.keeps:
            return self._fetched(offloaded)
        if offloaded not in self._onloaded:
            self._onloaded[offloaded] = self._fetched(offloaded)
        return self._onloaded[offloaded]

    def rows(self, offloaded: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a matrix of the host, kept or not."""
        if offloaded in self._rows:
            return self._rows[offloaded]
        onloaded = _rows(offloaded, self)
        if self.keeps_rows:
            self._rows[offloaded] = onloaded
        return onloaded

    def _fetched(self, offloaded: torch.Tensor) -> torch.Tensor:
        device = torch.device(self.onload_device)
        onloaded = through_page_locked(offloaded, device)
        if onloaded is not None:
            return to_tensor(onloaded, offloaded)  # a parameter, if it was one
        onloaded = self.cache.onload(offloaded)
        assert onloaded is not None
        return onloaded

    def offload(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return self.cache.offload(tensor)

    def update_offload(
        self, offloaded: torch.Tensor, data: torch.Tensor | None
    ) -> None:
        self._onloaded.pop(offloaded, None)
        self._rows.pop(offloaded, None)
        self.cache.update_offload(offloaded, data)

    def __delitem__(self, key: Hashable) -> None:
        self._onloaded.pop(self.offloaded_values[key], None)
        self._rows.pop(self.offloaded_values[key], None)
        del self.cache[key]

    def missing(self) -> int:
        """Bytes that it will keep and has not been asked for."""
        if not (self.keeps or self.keeps_rows):
            return 0
        kept = self._onloaded if self.keeps else self._rows
        left = (x for x in self.offloaded_values.values() if x is not None)
        missing = sum(tensor.nbytes for tensor in left if tensor not in kept)
        return missing if self.keeps else -(-missing // distributed.ranks())

    def holds(self) -> bool:
        """Whether anything is kept at the moment."""
        return (self.keeps and bool(self._onloaded)) or bool(self._rows)

    def release(self) -> None:
        """From here on as if nothing was kept."""
        self.keeps = self.keeps_rows = False
        self._onloaded.clear()
        self._rows.clear()


def own_rows(linear: Linear) -> torch.Tensor:
    """
    This rank's rows of a weight (`distributed.row_share`); of one that is offloaded to
    the host no others are onloaded.
    """
    cache = linear._parameters
    whole = isinstance(cache, Kept) and cache.keeps
    if isinstance(cache, OffloadCache) and not whole:
        offloaded = cache.offloaded_values["weight"]
        if offloaded.device.type == "cpu":
            kept = isinstance(cache, Kept)
            return cache.rows(offloaded) if kept else _rows(offloaded, cache)
    return linear.weight.detach()[distributed.row_share(linear.out_features)]


def _rows(offloaded: torch.Tensor, cache: OffloadCache) -> torch.Tensor:
    """This rank's rows of a matrix of the host, onloaded."""
    own = offloaded.detach()[distributed.row_share(len(offloaded))]
    device = torch.device(cache.onload_device)
    onloaded = through_page_locked(own, device)
    return own.to(device) if onloaded is None else onloaded


@contextmanager
def kept_onloaded(
    model: PreTrainedModel,
    blocks: Sequence[Module],
    memory: int,
    rows: Collection[Linear] = (),
) -> Iterator[int]:
    """
    Within the context the first blocks are onloaded once, as many as there is room for:
    the number that is yielded. If any are, so is what is outside the blocks. For a
    model that is not offloaded it is none.

    :param memory: bytes that a probe may take beside the model
    :param rows: Linears of the blocks of which this rank's rows stay, not the whole
    """
    inside = [_offloaded(block) for block in blocks]
    left, chosen = _room_on_device(model, blocks, memory), 0
    parts = set(rows)

    def size(module: Module) -> int:
        whole = _size(module)
        return -(-whole // distributed.ranks()) if module in parts else whole

    keep: set[Module] = set()
    for modules in filter(None, inside):  # others are on the device as it is
        left -= sum(map(size, modules))
        if left < 0:
            break
        keep |= set(modules)
        chosen += 1
    if chosen:
        keep |= set(_outside(model, blocks))
    onloaded: dict[torch.Tensor, torch.Tensor] = {}
    with ExitStack() as stack:
        stack.callback(give_back_page_locked)
        for module in _offloaded(model):
            keeps = module in keep and module not in parts
            keeps_rows = module in keep and module in parts
            stack.callback(_give_back, module)
            module._parameters = Kept(module._parameters, onloaded, keeps, keeps_rows)
            module._buffers = Kept(module._buffers, onloaded, keeps)
        if chosen:
            what = "this rank's rows of " if rows else ""
            logger.info(
                f"{what}{chosen} of {len(blocks)} blocks stay on "
                f"{get_execution_device(model)} while the allocation is made"
            )
        yield chosen


def release(model: Module) -> bool:
    """Give the room back; whether there was any to give."""
    kept = _kept(model)
    # asked first: what one lets go is let go for all, for weights may be tied
    held = any(tensors.holds() for tensors in kept)
    for tensors in kept:
        tensors.release()
    return held


def spare(model: PreTrainedModel, blocks: Sequence[Module], memory: int) -> int:
    """
    Bytes that are left on the device of an offloaded model beside a probe and the
    weights that stay.

    :param memory: bytes that a probe may take beside the model
    """
    missing = sum(tensors.missing() for tensors in _kept(model))
    return max(0, _room_on_device(model, blocks, memory) - missing)


def room(free: int, memory: int, block: int, outside: int) -> int:
    """
    Bytes for blocks that stay, on a device with so many free.

    :param memory: that a probe may take
    :param block: of the largest block: two are onloaded while one takes over
    :param outside: of what is outside the blocks, the embedding and the head
    """
    return max(0, int(free * (1 - RESERVE)) - memory - 2 * block - outside)


def _room_on_device(
    model: PreTrainedModel, blocks: Sequence[Module], memory: int
) -> int:
    device = torch.device(get_execution_device(model))
    free = None if device.type == "cpu" else free_memory(device)
    if free is None:
        return 0
    largest = max((sum(map(_size, _offloaded(block))) for block in blocks), default=0)
    away = (module for module in _outside(model, blocks) if not _stays(module))
    return room(free, memory, largest, sum(map(_size, away)))


def _kept(model: Module) -> list[Kept]:
    return [
        tensors
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        if isinstance(tensors, Kept)
    ]


def _stays(module: Module) -> bool:
    return isinstance(module._parameters, Kept) and module._parameters.keeps


def _offloaded(module: Module) -> list[Module]:
    return [one for one in module.modules() if is_offloaded(one)]


def _outside(model: Module, blocks: Sequence[Module]) -> list[Module]:
    """Those that lie in no block: the embedding, the head."""
    return [module for module in outside(model, blocks) if is_offloaded(module)]


def _size(module: Module) -> int:
    return sum(
        tensor.nbytes
        for tensors in (module._parameters, module._buffers)
        for tensor in stored(tensors).values()
        if tensor is not None
    )


def _give_back(module: Module) -> None:
    for name in ("_parameters", "_buffers"):
        tensors = getattr(module, name)
        if isinstance(tensors, Kept):
            tensors.release()
            setattr(module, name, tensors.cache)
