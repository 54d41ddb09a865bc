"""
Layer-wise sparsity for llm-compressor: importing this package registers
`AbsorptionAllocationModifier`, so that recipes in YAML find it.

llm-compressor and torch take seconds to import. So the public names are fetched when
they are used, and where llm-compressor is not imported yet the modifier is registered
as soon as it is.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from absorb_plugin._after_import import after_import
from absorb_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from absorb_plugin.allocators.base import (
        Allocator,
        BaseAllocation,
        LinearGroup,
        LinearStatistics,
    )
    from absorb_plugin.modifier import AbsorptionAllocationModifier

__all__ = [
    "AbsorptionAllocationModifier",
    "Allocator",
    "BaseAllocation",
    "LinearGroup",
    "LinearStatistics",
    "hookimpl",
]

MODIFIER = "absorb_plugin.modifier"  # registers itself
HOMES = {
    "AbsorptionAllocationModifier": MODIFIER,
    "Allocator": "absorb_plugin.allocators.base",
    "BaseAllocation": "absorb_plugin.allocators.base",
    "LinearGroup": "absorb_plugin.allocators.base",
    "LinearStatistics": "absorb_plugin.allocators.base",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})


after_import("llmcompressor", MODIFIER)
if "llmcompressor" in sys.modules:
    import_module(MODIFIER)
