"""
The pruners that follow the modifier in a recipe. Another one is a file of this folder
and a line in the list below.
"""

from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase

from absorb_plugin.pruners.base import MaskPruner, Pruner
from absorb_plugin.pruners.sparsegpt import SparseGPT
from absorb_plugin.pruners.wanda import Wanda

__all__ = ["PRUNERS", "MaskPruner", "Pruner", "SparseGPT", "Wanda", "pruner_class"]

PRUNERS: dict[str, type[Pruner]] = {
    pruner.name: pruner for pruner in (Wanda, SparseGPT)
}


def pruner_class(modifier: SparsityModifierBase) -> type[Pruner]:
    """
    :param modifier: of the recipe; subclasses prune as their base does
    :raises ValueError: if none of PRUNERS prunes so
    """
    for pruner in PRUNERS.values():
        if isinstance(modifier, pruner.modifier):
            return pruner
    known = ", ".join(pruner.modifier.__name__ for pruner in PRUNERS.values())
    raise ValueError(
        f"{type(modifier).__name__}: absorb_plugin does not know how it prunes, and so "
        f"cannot choose sparsities for it. Use one of {known}"
    )
