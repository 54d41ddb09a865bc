"""
Pruned weights and how they change with sparsity: by masks, or as the pruner itself made
them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import numpy as np
import torch
from compressed_tensors.offload import get_execution_device

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.forward.joined import joined_rows
from absorb_plugin.forward.linears import Weights, all_given
from absorb_plugin.pruners.masks import MaskedWeights, block_sparsities
from absorb_plugin.pruners.packed import HOST, Packed, unpacked

__all__ = ["Change", "MaskedSlopes", "PrunedSlopes", "SlopeSource", "band"]

# Weights are extrapolated up to so many times the distance of those that were made.
FARTHEST = 1.5


def band(sparsity: float, step: float) -> tuple[float, float]:
    """Both sides of a sparsity, within [0, 1]."""
    return max(0.0, sparsity - step), min(1.0, sparsity + step)


@dataclass(frozen=True)
class Change:
    """
    dW/ds of a Linear, times a number.

    :param matrix: of the weight's shape and dtype
    :param factor: what the matrix is to be multiplied by
    """

    matrix: torch.Tensor
    factor: float


# name of a Linear -> how its weight changes, None where it does not
Changes = Mapping[str, Callable[[], Change | None]]


class SlopeSource(Protocol):
    """
    The weights of an allocation, and how they change with its sparsities.

    Attributes:
        kept_weights: copies of the whole model that it keeps
        joined: whether this rank makes its rows alone of every weight, and all ranks
            put them together block by block
    """

    kept_weights: ClassVar[int]
    joined: bool

    def identity(self) -> list[object]:
        """What makes two of them equal (`fingerprint.digest`)."""

    def weights(self, index: int) -> Weights:
        """Relative name -> weight, of the Linears of a block that are pruned."""

    def with_changes(self, index: int) -> tuple[Weights, Changes]:
        """The same, and how they change; for a backward pass."""

    def rank(self, index: int) -> None:
        """Rank the weights of a block for all that follows."""

    def release(self) -> bool:
        """Bring to the host what lies on an accelerator; whether there was any."""


class MaskedSlopes:
    """
    The weights of an allocation under masks, and how they change with its sparsities.

    :param masks: makes the weights
    :param allocation: one sparsity per prunable Linear
    :param step: δ: the change is that from s − δ to s + δ
    """

    kept_weights: ClassVar[int] = 0

    def __init__(
        self,
        blocks: BlockMap,
        masks: MaskedWeights,
        allocation: np.ndarray,
        step: float,
    ) -> None:
        self._masks, self._step = masks, step
        self._sparsities = block_sparsities(blocks, allocation)
        self.joined = masks.joined
        # what the backward pass asks for after a change, made with it
        self._next: dict[tuple[int, str], torch.Tensor] = {}

    def identity(self) -> list[object]:
        return [self._masks, self._step, self._sparsities]

    def weights(self, index: int) -> Weights:
        if index not in self._sparsities:
            return {}
        if self.joined:
            return self._masks.weights(index, self._sparsities[index])
        return {
            name: partial(self._weight, index, name) for name in self._masks.seen(index)
        }

    def with_changes(self, index: int) -> tuple[Weights, Changes]:
        if not self.joined or index not in self._sparsities:
            weights = self.weights(index)
            return weights, {k: partial(self.change, index, k) for k in weights}
        linears, own, moving = self._masks.seen(index), {}, {}
        for name, sparsity in self._sparsities[index].items():
            if name in linears:
                own[name], moving[name] = self._masks.weight_and_between(
                    index, name, sparsity, *band(sparsity, self._step)
                )
        weights = all_given(joined_rows(linears, own))
        joined = joined_rows(linears, moving)
        return weights, {k: partial(_between, x) for k, x in joined.items()}

    def release(self) -> bool:
        """Nothing is kept."""
        return False

    def rank(self, index: int) -> None:
        for name in self._masks.seen(index):
            sparsity = self._sparsities[index][name]
            self._masks.rank(index, name, [sparsity, *band(sparsity, self._step)])

    def change(self, index: int, name: str) -> Change | None:
        """dW/ds of one Linear; None where W does not change."""
        sparsity = self._sparsities[index][name]
        weight, between = self._masks.weight_and_between(
            index, name, sparsity, *band(sparsity, self._step)
        )
        self._next = {(index, name): weight}
        return _between(between)

    def _weight(self, index: int, name: str) -> torch.Tensor:
        if (made := self._next.pop((index, name), None)) is not None:
            return made
        return self._masks.weight(index, name, self._sparsities[index][name])


def _between(weights: torch.Tensor) -> Change | None:
    """:param weights: that are masked on the way from one sparsity to another"""
    share = weights.count_nonzero().item() / weights.numel()
    return Change(weights, -1 / share) if share > 0 else None


class PrunedSlopes:
    """
    The same of weights that the pruner has made, kept on the host, or on an accelerator
    while there is room.
    Between the sparsities that it made they are interpolated, so that a few steps need
    no new ones.

    :param blocks: all blocks
    :param kept: index of a block -> name -> weights at s, s − δ and s + δ, packed where
        the model computes on an accelerator; of those that are joined this rank's rows
    :param made_at: the allocation of s, one sparsity per prunable Linear
    :param allocation: the one under which the network runs
    :param step: δ
    :param shares: index and name -> of all weights those that go from s − δ to s + δ,
        noted as they are counted
    :param joined: as of `MaskedWeights`
    """

    kept_weights: ClassVar[int] = 3

    def __init__(
        self,
        blocks: BlockMap,
        kept: Mapping[int, Mapping[str, list[torch.Tensor | Packed]]],
        made_at: np.ndarray,
        allocation: np.ndarray,
        *,
        step: float,
        shares: dict[tuple[int, str], float] | None = None,
        joined: bool = False,
    ) -> None:
        self._blocks, self._kept, self._step = blocks, kept, step
        self.joined = joined
        self._made_at = made_at
        self._shares = {} if shares is None else shares
        self._made = block_sparsities(blocks, made_at)
        self._wanted = block_sparsities(blocks, allocation)
        # packed weights of the block that ran last, where it runs
        self._fetched: dict[tuple[int, str, int], Packed] = {}

    def at(self, allocation: np.ndarray) -> "PrunedSlopes":
        """The weights of another allocation, near the one that they were made of."""
        return PrunedSlopes(
            self._blocks,
            self._kept,
            self._made_at,
            allocation,
            step=self._step,
            shares=self._shares,
            joined=self.joined,
        )

    def identity(self) -> list[object]:
        kept = {
            index: {name: list(map(_Made, weights)) for name, weights in made.items()}
            for index, made in self._kept.items()
        }
        return [kept, self._made, self._wanted, self._step]

    def release(self) -> bool:
        held = False
        for linears in self._kept.values():
            for weights in linears.values():
                held |= any(weight.device != HOST for weight in weights)
                weights[:] = [weight.to(HOST) for weight in weights]
        return held

    def weights(self, index: int) -> Weights:
        kept = self._kept.get(index, {})
        if self.joined:
            own = {name: self._weight(index, name) for name in kept}
            return all_given(joined_rows(self._blocks.blocks[index].linears, own))
        return {name: partial(self._weight, index, name) for name in kept}

    def with_changes(self, index: int) -> tuple[Weights, Changes]:
        weights = self.weights(index)
        if not self.joined:
            return weights, {k: partial(self.change, index, k) for k in weights}
        linears = self._blocks.blocks[index].linears
        own = {name: self._more_and_fewer(index, name) for name in weights}
        fewer = {k: n for k, (_, n) in own.items() if (index, k) not in self._shares}
        everywhere = distributed.meet(fewer) if weights else []
        for name in fewer:
            lost = sum(one[name] for one in everywhere)
            linear = linears[name]
            size = linear.out_features * linear.in_features
            self._shares[index, name] = lost / size
        joined = joined_rows(linears, {name: moved for name, (moved, _) in own.items()})
        return weights, {
            name: partial(_moving, moved, self._shares[index, name])
            for name, moved in joined.items()
        }

    def rank(self, index: int) -> None:
        """Nothing is left to do."""

    def _weight(self, index: int, name: str) -> torch.Tensor:
        made, wanted = self._made[index][name], self._wanted[index][name]
        low, high = band(made, self._step)
        other, way = (1, low - made) if wanted < made else (2, high - made)
        share = min(FARTHEST, (wanted - made) / way) if way else 0.0
        own = self._at_hand(index, name, 0)
        if share == 0.0:
            return own
        return torch.lerp(own, self._at_hand(index, name, other), share)

    def change(self, index: int, name: str) -> Change | None:
        """As of `MaskedSlopes`."""
        moved, fewer = self._more_and_fewer(index, name)
        share = self._shares.setdefault((index, name), fewer / moved.numel())
        return _moving(moved, share)

    def _more_and_fewer(self, index: int, name: str) -> tuple[torch.Tensor, int]:
        """
        What a weight gains on the way from s − δ to s + δ, and how many of its entries
        go; 0 where that has been noted.
        """
        less, more = (self._at_hand(index, name, which) for which in (1, 2))
        fewer = 0
        if (index, name) not in self._shares:
            fewer = int(less.count_nonzero() - more.count_nonzero())
        return more - less, fewer

    def _at_hand(self, index: int, name: str, which: int) -> torch.Tensor:
        """One of the weights that were made, packed ones where the model computes."""
        kept = self._kept[index][name][which]
        if isinstance(kept, torch.Tensor):
            return kept
        linear = self._blocks.blocks[index].linears[name]
        device = torch.device(get_execution_device(linear))
        if kept.device == device:
            return kept.weight()
        key = (index, name, which)
        if key not in self._fetched:
            # a block runs forward, or forward and backward, before another does
            self._fetched = {k: v for k, v in self._fetched.items() if k[0] == index}
            self._fetched[key] = kept.to(device)
        return self._fetched[key].weight()


def _moving(moved: torch.Tensor, share: float) -> Change | None:
    """:param share: of all weights, those that go on the way"""
    return Change(moved, 1 / share) if share > 0 else None


class _Made:
    """One such weight; its identity does not depend on how and where it is kept."""

    def __init__(self, weight: torch.Tensor | Packed) -> None:
        self._weight = weight

    def identity(self) -> torch.Tensor:
        return unpacked(self._weight) + 0.0  # of two kinds of zero the positive
