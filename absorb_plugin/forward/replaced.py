"""A module that computes something else for a while."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.nn import Module

__all__ = ["replaced_forward", "without_hooks"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextmanager
def replaced_forward(module: Module, forward: Callable) -> Iterator[None]:
    """Within the context `module` computes `forward`; hooks still fire."""
    missing = object()
    original = module.__dict__.get("forward", missing)
    try:
        module.forward = forward
        yield
    finally:
        if original is missing:
            module.__dict__.pop("forward", None)
        else:
            module.forward = original


@contextmanager
def without_hooks(module: Module) -> Iterator[None]:
    """Within the context no forward hook of `module` fires."""
    own = {name: getattr(module, name) for name in HOOKS}
    try:
        for name in HOOKS:
            setattr(module, name, OrderedDict())
        yield
    finally:
        for name, hooks in own.items():
            setattr(module, name, hooks)
