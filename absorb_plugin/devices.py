"""Where a model computes, and where its weights lie."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from compressed_tensors.offload import (
    disable_onloading,
    get_execution_device,
    set_onload_device,
)
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.offload.convert import from_accelerate
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from torch.nn import Module
from transformers import PreTrainedModel

__all__ = [
    "computes_on_cpu",
    "computing_on_one_device",
    "dtype_of",
    "empty_cache",
    "free_memory",
    "give_back_page_locked",
    "holds",
    "is_offloaded",
    "launches",
    "through_page_locked",
]

# A smaller tensor is there before it would have been copied.
PAGE_LOCKED_FROM = 2**20


@contextmanager
def computing_on_one_device(model: Module) -> Iterator[None]:
    """
    Within the context a model computes on one device, with its weights where they lie,
    as under `oneshot`. Where it is spread over several devices, or offloaded to the CPU
    or to disk, each weight is onloaded while it is used.

    A model of compressed-tensors computes where it did when the context is left.
    Accelerate's hooks are replaced by those of compressed-tensors for good. A model
    that is whole on one device stays as it is.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        from_accelerate(model)
    before = _onload_devices(model)
    try:
        if len(_compute_devices(model)) > 1:
            set_onload_device(model, get_main_device())
        yield
    finally:
        for module, device in before.items():
            _onload_to(module, device)


def computes_on_cpu(model: Module) -> bool:
    """Wherever its weights lie."""
    return torch.device(get_execution_device(model)).type == "cpu"


def launches(device: torch.device) -> bool:
    """Whether a step takes its time however small it is, as on accelerators."""
    return device.type != "cpu"


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    """As `model.dtype`, which would onload a weight for it."""
    with disable_onloading():
        return model.dtype


def holds(model: Module, dtype: torch.dtype) -> bool:
    """Whether some parameter or buffer is of a dtype; none is onloaded for it."""
    with disable_onloading():
        tensors = (
            getattr(module, name)
            for module in model.modules()
            for name in (*module._parameters, *module._buffers)
        )
        return any(tensor is not None and tensor.dtype == dtype for tensor in tensors)


def free_memory(device: torch.device) -> int | None:
    """
    Bytes that the driver has, and that torch holds without using them; None if torch
    cannot tell (before 2.10).

    :param device: an accelerator
    """
    if not hasattr(torch.accelerator, "get_memory_info"):
        return None
    free, _ = torch.accelerator.get_memory_info(device)
    reserved = torch.accelerator.memory_reserved(device)
    return free + reserved - torch.accelerator.memory_allocated(device)


def empty_cache() -> None:
    """Give back what torch holds of the accelerator's memory without using it."""
    there = torch.accelerator.is_available()
    if there and hasattr(torch.accelerator, "empty_cache"):
        torch.accelerator.empty_cache()


def is_offloaded(module: Module) -> bool:
    """Whether its own tensors are onloaded from elsewhere while they are used."""
    tensors = module._parameters
    if not isinstance(tensors, OffloadCache):
        return False
    return str(tensors.offload_device) != str(tensors.onload_device)


def through_page_locked(
    tensor: torch.Tensor, device: torch.device
) -> torch.Tensor | None:
    """
    A large tensor of the host on an accelerator, by way of page-locked memory: from
    there it reads at the speed of the bus, while from elsewhere the driver copies piece
    by piece on one thread. All of PyTorch's threads make the copy to there; where there
    is but one, nothing would be won.

    It does not wait for the tensor to be there, so that the next one is copied
    meanwhile: what uses it comes later in the same stream. Page-locked memory is used
    again once it has been read, until `give_back_page_locked`.

    :return: None for any other tensor, and where there is no such memory
    """
    size = tensor.nbytes
    if tensor.device.type != "cpu" or device.type == "cpu" or size < PAGE_LOCKED_FROM:
        return None
    if torch.get_num_threads() == 1 or size >= _refused.get(device, size + 1):
        return None
    try:
        locked = tensor.detach().pin_memory()
    except (RuntimeError, NotImplementedError) as error:
        # a limit of the system on such memory, or an accelerator that has none
        _refused[device] = size
        logger.info(
            f"{device}: weights of {size / 2**20:.0f} MiB and more come from pageable "
            f"memory ({error})"
        )
        return None
    _locked.add(device)
    return locked.to(device, non_blocking=True)


# device -> the smallest size that was refused, in bytes; and devices that had some
_refused: dict[torch.device, int] = {}
_locked: set[torch.device] = set()


def give_back_page_locked() -> None:
    """What torch holds of such memory without using it."""
    if _locked and hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
    _locked.clear()


def _compute_devices(model: Module) -> set[torch.device]:
    return {
        torch.device(get_execution_device(module))
        for module in model.modules()
        if len(module._parameters)
    }


def _onload_devices(model: Module) -> dict[Module, torch.device]:
    return {
        module: module._parameters.onload_device
        for module in model.modules()
        if isinstance(module._parameters, OffloadCache)
    }


def _onload_to(module: Module, device: torch.device) -> None:
    for tensors in (module._parameters, module._buffers):
        if isinstance(tensors, OffloadCache):
            tensors.onload_device = device
