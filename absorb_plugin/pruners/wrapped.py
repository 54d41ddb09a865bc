"""Methods of one modifier that do something more for the time of a run."""

from collections.abc import Callable
from functools import partial
from typing import Any

from llmcompressor.modifiers import Modifier

__all__ = ["unwrap", "wrap"]


def wrap(modifier: Modifier, method: str, around: Callable[..., Any]) -> None:
    """
    :param around: is called in its place from now on, with what was called until now in
        front of the arguments
    """
    # past pydantic, which takes no attribute that is no field
    object.__setattr__(modifier, method, partial(around, getattr(modifier, method)))


def unwrap(modifier: Modifier, method: str) -> None:
    """Undo every `wrap` of the method."""
    modifier.__dict__.pop(method, None)
