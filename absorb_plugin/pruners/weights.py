"""
Pruned weights for a probe: by masks that dense statistics allow, or block after block
as the pruner itself makes them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from compressed_tensors.offload import get_execution_device
from torch.nn import Linear, Module

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.forward.inputs import real_tokens
from absorb_plugin.forward.joined import joined_rows
from absorb_plugin.forward.linears import Weights, all_given, replaced_weights
from absorb_plugin.forward.parts import current_part
from absorb_plugin.forward.resident import own_rows
from absorb_plugin.groups import named
from absorb_plugin.pruners.base import MaskPruner, Pruner
from absorb_plugin.pruners.factor import Factor
from absorb_plugin.pruners.packed import HOST, Packed, unpacked

__all__ = [
    "Change",
    "MaskedSlopes",
    "MaskedWeights",
    "Observed",
    "ObservedInputs",
    "PrunedSlopes",
    "band",
    "block_sparsities",
    "prune_observed",
]


# Weights are extrapolated up to so many times the distance of those that were made.
FARTHEST = 1.5


def block_sparsities(
    blocks: BlockMap, allocation: np.ndarray
) -> dict[int, dict[str, float]]:
    """
    An allocation, one sparsity per prunable Linear, by block and relative name.
    """
    by_name = named(blocks, allocation)
    return {
        index: {
            name: by_name[blocks.blocks[index].full_name(name)]
            for name in blocks.blocks[index].linears
        }
        for index in blocks.prunable
    }


class MaskedWeights:
    """
    Masks of a model's Linears, made when a Linear runs. A threshold per row is kept, so
    that weights are ranked once for each sparsity.

    :param blocks: whose prunable Linears are masked
    :param pruner: ranks the weights
    :param input_square_sums: full name of a Linear -> a_j; a Linear without has seen no
        token and stays dense
    :param quantiles: what others with the same scores have found out about these, and
        these find out for others: full name of a Linear -> `MaskPruner.quantiles`. None
        to rank anew
    :param joined: whether each rank makes its rows alone of every weight, for a whole
        block at once; within a probe that is `in_step`
    """

    def __init__(
        self,
        blocks: BlockMap,
        pruner: MaskPruner,
        input_square_sums: Mapping[str, torch.Tensor],
        quantiles: dict[str, torch.Tensor] | None = None,
        joined: bool = False,
    ) -> None:
        self._blocks, self._pruner = blocks, pruner
        self._square_sums, self._quantiles = input_square_sums, quantiles
        # others than by rows look at the whole
        self.joined = joined and pruner.by_row
        self._thresholds: dict[tuple[str, float], torch.Tensor] = {}

    def identity(self) -> list[object]:
        """What makes two of them equal (`fingerprint.digest`)."""
        return [self._blocks, self._pruner, self._square_sums]

    def seen(self, index: int) -> dict[str, Linear]:
        """Relative name -> Linear of a block, of those that can be masked."""
        block = self._blocks.blocks[index]
        return {
            name: linear
            for name, linear in block.linears.items()
            if block.full_name(name) in self._square_sums
        }

    def weights(self, index: int, sparsities: Mapping[str, float]) -> Weights:
        """:param sparsities: relative name -> sparsity in [0, 1]"""
        if self.joined:
            own = {k: self.weight(index, k, sparsities[k]) for k in self.seen(index)}
            return all_given(joined_rows(self.seen(index), own))
        return {
            name: partial(self.weight, index, name, sparsities[name])
            for name in self.seen(index)
        }

    def applied(
        self, index: int, sparsities: Mapping[str, float]
    ) -> AbstractContextManager[None]:
        """Within the context the Linears of a block compute with their weights."""
        linears = self._blocks.blocks[index].linears
        return replaced_weights(linears, self.weights(index, sparsities))

    def weight(self, index: int, name: str, sparsity: float) -> torch.Tensor:
        """The masked weight of one Linear; of one that is joined this rank's rows."""
        weight, observed, (at,) = self._ranked(index, name, [sparsity])
        return self._pruner.masked(weight, observed, at)

    def weight_and_between(
        self, index: int, name: str, sparsity: float, low: float, high: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the weights that go between two other sparsities."""
        weight, observed, at = self._ranked(index, name, [sparsity, low, high])
        return self._pruner.masked_and_between(weight, observed, *at)

    def _ranked(
        self, index: int, name: str, sparsities: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Weight, a_j, and the threshold per row of every sparsity."""
        weight, full = self._own(index, name)
        new = [s for s in sparsities if (full, s) not in self._thresholds]
        if new:
            self.rank(index, name, new)
        at = [self._thresholds[full, s].to(weight.device) for s in sparsities]
        return weight, self._square_sums[full].to(weight.device), at

    def rank(self, index: int, name: str, sparsities: Sequence[float]) -> None:
        """Find the thresholds of several sparsities at once, which costs as one."""
        weight, full = self._own(index, name)
        observed = self._square_sums[full].to(weight.device)
        known = self._known(full, weight, observed)
        found = self._pruner.thresholds(weight, observed, sparsities, known)
        for sparsity, at in zip(sparsities, found.split(1, dim=1), strict=True):
            self._thresholds[full, sparsity] = at

    def _own(self, index: int, name: str) -> tuple[torch.Tensor, str]:
        """The dense weight of a Linear, or this rank's rows, and its full name."""
        block = self._blocks.blocks[index]
        linear, full = block.linears[name], block.full_name(name)
        return own_rows(linear) if self.joined else linear.weight.detach(), full

    def _known(
        self, full: str, weight: torch.Tensor, observed: torch.Tensor
    ) -> torch.Tensor | None:
        # on a CPU a sort takes no longer than to pick out what lies between quantiles
        on_cpu = weight.device.type == "cpu"
        if self._quantiles is None or on_cpu or not self._pruner.by_row:
            return None
        if full not in self._quantiles:
            self._quantiles[full] = self._pruner.quantiles(weight, observed)
        return self._quantiles[full]


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


class MaskedSlopes:
    """
    The weights of an allocation under masks, and how they change with its sparsities.

    :param masks: makes the weights
    :param allocation: one sparsity per prunable Linear
    :param step: δ: the change is that from s − δ to s + δ
    """

    kept_weights = 0

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
        """What makes two of them equal (`fingerprint.digest`)."""
        return [self._masks, self._step, self._sparsities]

    def weights(self, index: int) -> Weights:
        """Relative name -> weight, of the Linears of a block that are pruned."""
        if index not in self._sparsities:
            return {}
        if self.joined:
            return self._masks.weights(index, self._sparsities[index])
        return {
            name: partial(self._weight, index, name) for name in self._masks.seen(index)
        }

    def with_changes(self, index: int) -> tuple[Weights, Changes]:
        """The same, and how they change; for a backward pass."""
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
        """Rank the weights of a block for all that follows."""
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

    kept_weights = 3

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
        """What makes two of them equal (`fingerprint.digest`)."""
        kept = {
            index: {name: list(map(_Made, weights)) for name, weights in made.items()}
            for index, made in self._kept.items()
        }
        return [kept, self._made, self._wanted, self._step]

    def made(self) -> dict[int, dict[str, list[torch.Tensor]]]:
        """Index of a block -> name -> weights at s, s − δ and s + δ, where they are."""
        return {
            index: {
                name: list(map(unpacked, weights)) for name, weights in linears.items()
            }
            for index, linears in self._kept.items()
        }

    def release(self) -> bool:
        """Where some lie on an accelerator, bring them to the host."""
        held = False
        for linears in self._kept.values():
            for weights in linears.values():
                held |= any(weight.device != HOST for weight in weights)
                weights[:] = [weight.to(HOST) for weight in weights]
        return held

    def weights(self, index: int) -> Weights:
        """As of `MaskedSlopes`."""
        kept = self._kept.get(index, {})
        if self.joined:
            own = {name: self._weight(index, name) for name in kept}
            return all_given(joined_rows(self._blocks.blocks[index].linears, own))
        return {name: partial(self._weight, index, name) for name in kept}

    def with_changes(self, index: int) -> tuple[Weights, Changes]:
        """As of `MaskedSlopes`."""
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


class Observed:
    """
    What a pruner observes of the inputs of a block's Linears.

    :param groups: sums of what it observed, or what the ranks made of them, and the
        names of the Linears that they are the inputs of
    """

    def __init__(self) -> None:
        self.groups: list[tuple[torch.Tensor | Factor, list[str]]] = []
        self._home: dict[str, int] = {}  # name -> index of its group

    def add(self, observed: torch.Tensor, name: str) -> None:
        """Of the inputs of a Linear, which others may share (`share`)."""
        if name in self._home:  # of other samples of the batch
            total = self.groups[self._home[name]][0]
            assert isinstance(total, torch.Tensor)
            total.add_(observed)
        else:
            self._home[name] = len(self.groups)
            self.groups.append((observed, [name]))

    def share(self, name: str, first: str) -> None:
        """`name` has the inputs of `first`."""
        if name not in self._home:
            self._home[name] = self._home[first]
            self.groups[self._home[first]][1].append(name)


def prune_observed(
    pruner: Pruner,
    linears: Mapping[str, Linear],
    observed: Sequence[Observed],
    sparsities: Sequence[Mapping[str, Sequence[float]]],
) -> list[dict[str, list[torch.Tensor]]]:
    """
    What a pruner makes of a block, for each of several sets of inputs.

    :param linears: relative name -> Linear
    :param sparsities: per set of inputs, relative name -> sparsities
    :return: per set of inputs, relative name -> pruned weights, one per sparsity
    """
    pruned: list[dict[str, list[torch.Tensor]]] = [{} for _ in observed]
    # an expert may have seen tokens of one set only
    alike: dict[tuple[str, ...], list[tuple[int, torch.Tensor | Factor]]] = {}
    for number, one in enumerate(observed):
        for total, names in one.groups:
            alike.setdefault(tuple(names), []).append((number, total))
    for group, sets in alike.items():
        weights = [linears[name].weight for name in group]
        wanted = [[sparsities[number][name] for name in group] for number, _ in sets]
        found = pruner.prune_each(weights, [total for _, total in sets], wanted)
        for (number, _), own in zip(sets, found, strict=True):
            pruned[number] |= dict(zip(group, own, strict=True))
    return pruned


class ObservedInputs:
    """
    Watches the Linears of one block while the model runs it.

    :param pruner: observes
    :param linears: relative name -> Linear
    :param mask: True where a token counts, (batch, tokens)
    """

    def __init__(
        self, pruner: Pruner, linears: Mapping[str, Linear], mask: torch.Tensor
    ) -> None:
        self._pruner, self._linears, self._mask = pruner, linears, mask
        self._last: torch.Tensor | None = None  # what entered the last Linear
        self._first = ""  # the first Linear that it entered

    @contextmanager
    def watched(self) -> Iterator[Observed]:
        found = Observed()
        with ExitStack() as stack:
            for name, linear in self._linears.items():
                note = partial(self._note, found, name)
                # in one line: between two lines an interrupt may come
                stack.callback(linear.register_forward_pre_hook(note).remove)
            yield found
            self._last = None

    def _note(
        self, found: Observed, name: str, module: Module, args: tuple[torch.Tensor, ...]
    ) -> None:
        x = args[0]
        mask = self._mask[current_part()]
        if not x.numel() or not mask.any():  # an expert without tokens; none to count
            return
        if self._last is x:
            found.share(name, self._first)
            return
        self._last, self._first = x, name
        rows, counted = real_tokens(x.detach(), mask)
        found.add(self._pruner.observe(rows[counted]), name)
