"""Where a model computes, and where its weights lie."""

import torch
from compressed_tensors.offload import get_execution_device, set_onload_device
from compressed_tensors.offload.convert import from_accelerate
from llmcompressor.utils.dev import get_main_device
from transformers import PreTrainedModel

__all__ = ["compute_on_one_device"]


def compute_on_one_device(model: PreTrainedModel) -> None:
    """
    Have a model compute on one device, with its weights where they lie, as `oneshot`
    does. Where accelerate has spread it over several devices, or offloaded it to the
    CPU or to disk, each weight is onloaded while it is used. A model that is whole on
    one device stays as it is.

    :param model: changed in place
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        from_accelerate(model)
    if len(_compute_devices(model)) > 1:
        set_onload_device(model, get_main_device())


def _compute_devices(model: torch.nn.Module) -> set[torch.device]:
    return {
        torch.device(get_execution_device(module))
        for module in model.modules()
        if len(module._parameters)
    }
