"""Bounds of single Linears, by patterns of their names."""

from collections.abc import Mapping, Sequence

import numpy as np
from compressed_tensors.utils import match_name

from absorb_plugin.blocks import BlockMap
from absorb_plugin.groups import linear_names
from absorb_plugin.mistakes import check_patterns

__all__ = ["Limits", "bounds_of", "check_limits", "check_matched"]

# name or "re:..." -> least and largest sparsity
Limits = Mapping[str, tuple[float, float]]


def check_limits(limits: Limits) -> None:
    """:raises ValueError: unless 0 <= low <= high <= 1, and of wrong expressions"""
    check_patterns("limits", limits)
    for pattern, (low, high) in limits.items():
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(
                f"limits[{pattern!r}]={[low, high]}: write [low, high] with "
                "0 <= low <= high <= 1"
            )


def check_matched(limits: Limits, pruned: Sequence[BlockMap]) -> None:
    """
    :param pruned: the Linears of every pruning modifier
    :raises ValueError: naming a pattern that matches none of all
    """
    names = [name for blocks in pruned for name in linear_names(blocks)]
    for pattern in limits:
        if not any(match_name(name, pattern) for name in names):
            raise ValueError(
                f"limits: {pattern!r} matches none of the {len(names)} Linears that "
                f"are pruned ({names[0]} …). Write a full name, or re: and a regular "
                "expression"
            )


def bounds_of(
    blocks: BlockMap, limits: Limits, max_sparsity: float
) -> tuple[np.ndarray, np.ndarray]:
    """
    Where several patterns match a Linear, the narrower bound of each counts.

    :param limits: patterns as in `ignore`: full names, or "re:" and an expression that
        matches their beginning
    :return: low and high of every prunable Linear, each of shape (N,)
    :raises ValueError: naming a Linear for which two patterns leave nothing
    """
    names = linear_names(blocks)
    low, high = np.zeros(len(names)), np.full(len(names), max_sparsity)
    for pattern, (least, most) in limits.items():
        matched = np.array([match_name(name, pattern) for name in names], dtype=bool)
        low[matched] = np.maximum(low[matched], least)
        high[matched] = np.minimum(high[matched], most)
    for name, least, most in zip(names, low, high, strict=True):
        if least > most:
            own = {k: list(v) for k, v in limits.items() if match_name(name, k)}
            raise ValueError(
                f"limits leave no sparsity for {name}, which {own} match: its least "
                f"would be {least}, and with max_sparsity={max_sparsity} its largest "
                f"{most}. Change one of them, or have patterns match fewer Linears"
            )
    return low, high
