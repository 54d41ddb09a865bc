"""Ask the base allocator, and meet the budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import torch

from absorb_plugin import distributed
from absorb_plugin.allocators.base import (
    Allocator,
    BaseAllocation,
    LinearGroup,
    LinearStatistics,
    Remember,
)
from absorb_plugin.blocks import BlockMap, linear_parameters
from absorb_plugin.cache import ProfileCache
from absorb_plugin.groups import linear_names
from absorb_plugin.plugins import run_allocator, version_of
from absorb_plugin.search.budget import Budget

__all__ = ["Base", "Numbers", "base_allocation", "groups_of"]


@dataclass(frozen=True)
class Base:
    """
    The base allocation, budget met.

    :param sparsity: one per prunable Linear, shape (N,)
    :param metric: the allocator's metric per prunable block, shape (L,)
    :param linear_metrics: full name of a Linear -> metric, where there is one
    """

    sparsity: np.ndarray
    metric: np.ndarray
    linear_metrics: Mapping[str, float]


class Numbers:
    """In place of a `ProfileCache`, for as long as it is held."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], float] = {}

    def numbers_for(self, owner: str) -> Callable[[str], Remember]:
        """As of `ProfileCache`."""
        return lambda linear: partial(self._number, owner, linear)

    def _number(
        self, owner: str, linear: str, name: str, compute: Callable[[], float]
    ) -> float:
        key = (owner, linear, name)
        if key not in self._known:
            self._known[key] = float(compute())
        return self._known[key]


def base_allocation(
    allocator: Allocator,
    blocks: BlockMap,
    statistics: Mapping[str, torch.Tensor],
    budget: Budget,
    *,
    measured: Mapping[str, float] | None = None,
    granularity: str = "block",
    cache: ProfileCache | Numbers | None = None,
) -> Base:
    """
    :param statistics: full name of a Linear -> a_j; empty where none are needed
    :param measured: full name of a Linear -> what the allocator's `measure` returned
    :param granularity: what the allocator ranks, "block" or "linear"
    :param cache: of what takes long and depends on a weight alone
    """
    if allocator.needs == "weights":
        with distributed.fail_together():
            _check_finite(blocks)  # else the forward pass of the statistics tells
    remember = None if cache is None else cache.numbers_for(version_of(allocator))
    groups = groups_of(blocks, statistics, granularity, remember, measured)
    with distributed.fail_together():  # another package's may fail on one rank alone
        answer = run_allocator(allocator, groups, budget.sparsity)
    found = distributed.from_first(answer)
    by_block = granularity == "block"
    wished = _by_linear(groups, np.asarray(found.sparsity), by_block)
    names = linear_names(blocks)
    sparsity = budget.meet(np.array([wished[name] for name in names]))
    if by_block:
        metric = np.asarray(found.metric, dtype=np.float64)
        return Base(sparsity, metric, _linear_metrics(groups, found))
    metrics = _by_linear(groups, np.asarray(found.metric), by_block)
    means = [
        np.mean([metrics[block.full_name(name)] for name in block.linears])
        for block in (blocks.blocks[index] for index in blocks.prunable)
    ]
    return Base(sparsity, np.array(means), metrics)


def groups_of(
    blocks: BlockMap,
    input_square_sums: Mapping[str, torch.Tensor],
    granularity: str = "block",
    remember: Callable[[str], Remember] | None = None,
    measured: Mapping[str, float] | None = None,
) -> list[LinearGroup]:
    """
    What an allocator ranks: one group per prunable block or per prunable Linear.

    :param input_square_sums: full name of a Linear -> a_j, or empty; a Linear that saw
        no token (an expert never routed to) has zeros
    :param remember: full name of a Linear -> what its `LinearStatistics.remember` is
    :param measured: full name of a Linear -> `LinearStatistics.measured`, or empty; a
        Linear that saw no token has 0
    """
    groups = []
    for index in blocks.prunable:
        block = blocks.blocks[index]
        statistics = {}
        for name, linear in block.linears.items():
            full = block.full_name(name)
            sums = None
            if input_square_sums:
                zeros = torch.zeros(linear.in_features)
                sums = input_square_sums.get(full, zeros)
            known = {} if remember is None else {"remember": remember(full)}
            number = measured.get(full, 0.0) if measured else None
            statistics[name] = LinearStatistics(linear, sums, measured=number, **known)
        if granularity == "block":
            known_to_all = MappingProxyType(statistics)  # allocators are others' code
            groups.append(LinearGroup(block.name, known_to_all, block.parameters))
            continue
        for name, one in statistics.items():
            size = linear_parameters(block.linears[name])
            alone = MappingProxyType({name: one})
            groups.append(LinearGroup(block.full_name(name), alone, size))
    return groups


def _by_linear(
    groups: Sequence[LinearGroup], values: np.ndarray, by_block: bool
) -> dict[str, float]:
    """Full name of every Linear -> the value of its group."""
    return {
        f"{group.name}.{name}" if by_block else group.name: value
        for group, value in zip(groups, values.tolist(), strict=True)
        for name in group.linears
    }


def _check_finite(blocks: BlockMap) -> None:
    for name, linear in blocks.linears().items():
        if not torch.isfinite(linear.weight).all():
            raise ValueError(
                f"the weight of {name} holds NaN or infinity: check the checkpoint and "
                "the dtype that it is loaded in"
            )


def _linear_metrics(
    groups: Sequence[LinearGroup], found: BaseAllocation
) -> dict[str, float]:
    if not found.linear_metrics:
        return {}
    return {
        f"{group.name}.{name}": float(metric)
        for group, metrics in zip(groups, found.linear_metrics, strict=True)
        for name, metric in metrics.items()
    }
