"""The hooks a plugin may implement; the built-in allocators use the same ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:  # the built-ins import `hookimpl` from here
    from absorb_plugin.allocators.base import Allocator

__all__ = ["PROJECT", "allocation_finished", "hookimpl", "hookspec"]
__all__ += ["register_allocators"]

PROJECT = "absorb_plugin"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_allocators() -> list[type[Allocator]]:  # type: ignore[empty-body]
    """Return the allocator classes this plugin adds."""


@hookspec
def allocation_finished(profile: dict[str, Any]) -> None:
    """Look at an allocation, as JSON would hold it, once the pruner has it."""
