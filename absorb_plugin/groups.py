"""
Groups of Linears that are corrected alike, and what an allocation is: one sparsity per
Linear. Whatever is judged, handed over or reported is such a vector.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from absorb_plugin.blocks import BlockMap, linear_parameters

__all__ = ["LEVELS", "Groups", "group_name", "linear_names", "linear_sizes", "named"]

LEVELS = ("block", "part", "linear")
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


@dataclass(frozen=True)
class Groups:
    """
    Linears that share a correction.

    "block": all Linears of a block. "part": those under one child of a block, its
    attention or its MLP; Linears that are themselves children of the block make one
    part. "linear": each Linear for itself. The experts of a mixture share a group at
    every level (at "linear" one per kind of projection): a single expert sees too few
    tokens for a slope of its own.

    :param names: of the groups, shape (G,)
    :param linears: full names of all prunable Linears, in model order, shape (N,)
    :param sizes: number of weights of each Linear, shape (N,)
    :param of: index of each Linear's group, shape (N,)
    :param block_of: index of each group's block, shape (G,)
    """

    names: tuple[str, ...]
    linears: tuple[str, ...]
    sizes: np.ndarray
    of: np.ndarray
    block_of: np.ndarray

    @classmethod
    def at(cls, level: str, blocks: BlockMap) -> "Groups":
        """:param level: one of LEVELS"""
        homes = [
            (block.full_name(name), group_name(level, block.name, name), number)
            for number, block in enumerate(blocks.blocks)
            for name in block.linears
        ]
        block_of = {group: number for _, group, number in homes}
        index = {name: number for number, name in enumerate(block_of)}
        return cls(
            tuple(block_of),
            tuple(linear for linear, _, _ in homes),
            linear_sizes(blocks),
            np.array([index[group] for _, group, _ in homes], dtype=int),
            np.array(list(block_of.values()), dtype=int),
        )

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def group_sizes(self) -> np.ndarray:
        """Number of weights of each group, shape (G,)."""
        return self.total(self.sizes)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """
        :param values: one number per group, shape (G,)
        :return: the same for every Linear of the group, shape (N,)
        """
        return np.asarray(values)[self.of]

    def total(self, values: np.ndarray) -> np.ndarray:
        """
        :param values: one number per Linear, shape (N,)
        :return: their sum over each group, shape (G,)
        """
        return np.bincount(self.of, values, len(self.names))

    def mean(self, values: np.ndarray) -> np.ndarray:
        """As `total`, but the mean over the group's weights."""
        return self.total(self.sizes * values) / self.group_sizes


def linear_names(blocks: BlockMap) -> list[str]:
    """Full names of all prunable Linears, in model order."""
    return list(blocks.linears())


def linear_sizes(blocks: BlockMap) -> np.ndarray:
    """Their numbers of weights, shape (N,)."""
    sizes = [linear_parameters(linear) for linear in blocks.linears().values()]
    return np.array(sizes, dtype=np.float64)


def named(blocks: BlockMap, sparsities: np.ndarray) -> dict[str, float]:
    """Full name of every prunable Linear -> its entry of an allocation."""
    return dict(zip(linear_names(blocks), map(float, sparsities), strict=True))


def group_name(level: str, block: str, linear: str) -> str:
    """
    :param block: full name of a block
    :param linear: name of a Linear in it
    """
    if level == "block":
        return block
    if level == "part":
        child, _, inner = linear.partition(".")
        return f"{block}.{child}" if inner else f"{block}.(own Linears)"
    any_expert = EXPERT.sub(r"\1experts.*.", linear)
    return f"{block}.{any_expert}"
