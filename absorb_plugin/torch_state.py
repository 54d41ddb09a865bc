"""Torch as it comes, whatever a script has set around us."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import Module

__all__ = ["check_differentiable", "plain_torch", "stored"]


@contextmanager
def plain_torch() -> Iterator[None]:
    """
    Within the context there is no autocast, no inference mode and no other default
    dtype or device, so that an allocation is the same wherever it is called from.
    Deterministic algorithms stay; where torch has none, it warns instead of raising.
    Afterwards all is as it was. Also a decorator.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in {"cpu", _accelerator()}:
            stack.enter_context(torch.autocast(device, enabled=False))
        # its every call goes through Python: thousands of Linears took a third longer
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.are_deterministic_algorithms_enabled():
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(
                torch.use_deterministic_algorithms, True, warn_only=warn_only
            )
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield


def stored(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Parameters or buffers of a module as they lie, without onloading any.

    :param tensors: `module._parameters` or `module._buffers`
    """
    return getattr(tensors, "offloaded_values", tensors)


def check_differentiable(model: Module) -> None:
    """
    :raises ValueError: if weights were made in inference mode, which torch does not
        differentiate through
    """
    for name, module in model.named_modules():
        if any(
            isinstance(x, torch.Tensor) and x.is_inference()
            for x in stored(module._parameters).values()
        ):
            raise ValueError(
                f"model: the weights of {name} were made under torch.inference_mode: "
                "the slope of the loss cannot be taken through them, and no pruner can "
                "write to them. Load the model outside of it"
            )


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type
