"""Wanda (https://arxiv.org/abs/2306.11695): the least |W_ij|·√a_j of every row go."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase

from absorb_plugin.pruners.base import MaskPruner

__all__ = ["Wanda"]


@dataclass(frozen=True)
class Wanda(MaskPruner):
    """Its only setting is the sparsity."""

    name: ClassVar[str] = "wanda"
    modifier: ClassVar[type[SparsityModifierBase]] = WandaPruningModifier
    rank_statistics: ClassVar[str] = "_row_scalars"

    def score(self, weight: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
        # in float32, as the second factor is: no copy of the weight in it
        return weight.abs() * observed.to(weight.device).float().sqrt()
