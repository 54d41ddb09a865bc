"""Plugins that are there for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from absorb_plugin.hookspecs import hookimpl
from absorb_plugin.plugins import manager

__all__ = ["registered"]


@contextmanager
def registered(*classes: Any, name: str = "throwaway") -> Iterator[None]:
    class Plugin:
        @hookimpl
        def register_allocators(self) -> list[Any]:
            return list(classes)

    manager().register(Plugin(), name=name)
    try:
        yield
    finally:
        manager().unregister(name=name)
