"""
Layer-wise sparsity for llm-compressor: importing this package registers
`AbsorptionAllocationModifier`, so that recipes in YAML find it.
"""

from absorb_plugin._llmcompressor import ModifierFactory
from absorb_plugin.allocators.base import (
    Allocator,
    BaseAllocation,
    LinearGroup,
    LinearStatistics,
)
from absorb_plugin.hookspecs import hookimpl
from absorb_plugin.modifier import AbsorptionAllocationModifier

__all__ = [
    "AbsorptionAllocationModifier",
    "Allocator",
    "BaseAllocation",
    "LinearGroup",
    "LinearStatistics",
    "hookimpl",
]

ModifierFactory.register(
    AbsorptionAllocationModifier.__name__, AbsorptionAllocationModifier
)
