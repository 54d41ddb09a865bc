"""
The base allocators. They are registered through the hook that outsiders use; a seventh
is one file here and one name in the list below.
"""

from absorb_plugin.hookspecs import hookimpl

from .alpha_pruning import AlphaPruning
from .atp import Atp
from .base import Allocator, BaseAllocation, LinearGroup, LinearStatistics
from .dlp import Dlp
from .lsa import Lsa
from .owl import Owl
from .uniform import Uniform

__all__ = [
    "Allocator",
    "AlphaPruning",
    "Atp",
    "BaseAllocation",
    "Dlp",
    "LinearGroup",
    "LinearStatistics",
    "Lsa",
    "Owl",
    "Uniform",
]


@hookimpl
def register_allocators() -> list[type[Allocator]]:
    return [Uniform, Owl, AlphaPruning, Dlp, Lsa, Atp]
