"""
Offloaded blocks that stay on the accelerator from one forward to the next.

An allocation runs dozens of forwards of few tokens, and offloaded weights are onloaded
in every one of them, for most of its time (docs/scaling.md). So as many blocks as the
device has room for beside a probe are onloaded once. The room is given back for a probe
that passes its limit, and where a batch does not fit.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from compressed_tensors.offload import get_execution_device
from compressed_tensors.offload.cache import OffloadCache
from loguru import logger
from torch.nn import Module
from transformers import PreTrainedModel

from absorb_plugin.devices import free_memory, is_offloaded
from absorb_plugin.torch_state import stored

__all__ = ["kept_onloaded", "release", "room", "spare"]

# Of what is free, left alone: memory is not handed out without gaps.
RESERVE = 0.1


class Kept(OffloadCache):
    """
    Parameters or buffers of a module, onloaded at first use and kept until `release`.

    :param cache: as the module had them
    """

    offload_device: torch.device | str

    def __init__(self, cache: OffloadCache) -> None:
        super().__init__(cache.onload_device)
        self.offload_device = cache.offload_device
        self.offloaded_values = cache.offloaded_values
        self.cache = cache
        self._keeps = True
        self._onloaded: dict[torch.Tensor, torch.Tensor] = {}

    def onload(self, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        if offloaded is None or not self._keeps:
            return self.cache.onload(offloaded)
        if offloaded not in self._onloaded:
            self._onloaded[offloaded] = self.cache.onload(offloaded)
        return self._onloaded[offloaded]

    def offload(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return self.cache.offload(tensor)

    def update_offload(
        self, offloaded: torch.Tensor, data: torch.Tensor | None
    ) -> None:
        self._onloaded.pop(offloaded, None)
        self.cache.update_offload(offloaded, data)

    def __delitem__(self, key: Hashable) -> None:
        self._onloaded.pop(self.offloaded_values[key], None)
        del self.cache[key]

    def missing(self) -> int:
        """Bytes that it will keep and has not been asked for."""
        tensors = self.offloaded_values.values() if self._keeps else ()
        return sum(
            tensor.nbytes
            for tensor in tensors
            if tensor is not None and tensor not in self._onloaded
        )

    def release(self) -> bool:
        """From here on as if nothing was kept; whether anything was until now."""
        held, self._keeps = bool(self._onloaded), False
        self._onloaded.clear()
        return held


@contextmanager
def kept_onloaded(
    model: PreTrainedModel, blocks: Sequence[Module], memory: int
) -> Iterator[int]:
    """
    Within the context the first blocks are onloaded once, as many as there is room for:
    the number that is yielded. For a model that is not offloaded it is none.

    :param memory: bytes that a probe may take beside the model
    """
    offloaded = [_offloaded(block) for block in blocks]
    sizes = [sum(map(_size, modules)) for modules in offloaded]
    left, chosen = _room_on_device(model, sizes, memory), 0
    with ExitStack() as stack:
        for modules, size in zip(offloaded, sizes, strict=True):
            left -= size
            if left < 0:
                break
            for module in modules:
                stack.callback(_give_back, module)
                module._parameters = Kept(module._parameters)
                module._buffers = Kept(module._buffers)
            chosen += bool(modules)
        if chosen:
            logger.info(
                f"{chosen} of {len(blocks)} blocks stay on "
                f"{get_execution_device(model)} while the allocation is made"
            )
        yield chosen


def release(blocks: Sequence[Module]) -> bool:
    """Give the room back; whether there was any to give."""
    held = [
        tensors.release()
        for block in blocks
        for module in block.modules()
        for tensors in (module._parameters, module._buffers)
        if isinstance(tensors, Kept)
    ]
    return any(held)


def spare(model: PreTrainedModel, blocks: Sequence[Module], memory: int) -> int:
    """
    Bytes that are left on the device of an offloaded model beside a probe and the
    blocks that stay.

    :param memory: bytes that a probe may take beside the model
    """
    sizes = [sum(map(_size, _offloaded(block))) for block in blocks]
    missing = sum(
        tensors.missing()
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        if isinstance(tensors, Kept)
    )
    return max(0, _room_on_device(model, sizes, memory) - missing)


def room(free: int, memory: int, block: int, outside: int) -> int:
    """
    Bytes for blocks that stay, on a device with so many free.

    :param memory: that a probe may take
    :param block: of the largest block: two are onloaded while one takes over
    :param outside: of what is outside the blocks, the embedding and the head
    """
    return max(0, int(free * (1 - RESERVE)) - memory - 2 * block - outside)


def _room_on_device(model: PreTrainedModel, sizes: Sequence[int], memory: int) -> int:
    """:param sizes: bytes of every block that are offloaded"""
    device = torch.device(get_execution_device(model))
    free = None if device.type == "cpu" else free_memory(device)
    if free is None:
        return 0
    outside = sum(map(_size, _offloaded(model))) - sum(sizes)
    return room(free, memory, max(sizes, default=0), outside)


def _offloaded(module: Module) -> list[Module]:
    return [one for one in module.modules() if is_offloaded(one)]


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
