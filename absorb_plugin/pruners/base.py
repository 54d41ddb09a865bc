"""What a pruner is: what it sees of a Linear's inputs, and what it makes of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase

from absorb_plugin.forward.chunks import row_chunks
from absorb_plugin.forward.inputs import square_sum
from absorb_plugin.pruners.factor import Factor
from absorb_plugin.pruners.thresholds import (
    row_quantiles,
    row_thresholds,
    thresholds_between,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MaskPruner", "Pruner"]


class Pruner:
    """
    The arithmetic of a pruning modifier. A subclass is a frozen dataclass of the
    modifier's settings, one file of this folder and one line in PRUNERS.

    Class attributes:
        name: how recipes of the command line call it
        modifier: the class of llm-compressor that prunes so
        rank_statistics: attribute of the modifier that holds, per module, the mean over
            its samples of what it observes (`pruners.ranks`); None if there is none
        hessians: whether `observe` returns a matrix that is factored
        factors_together: whether it has `factored`, by which several ranks do so
        tokens_per_column: calibration tokens that a run should have per column of the
            widest Linear, below which it warns; 0 for any number
    """

    name: ClassVar[str]
    modifier: ClassVar[type[SparsityModifierBase]]
    rank_statistics: ClassVar[str | None] = None
    hessians: ClassVar[bool] = False
    factors_together: ClassVar[bool] = False
    tokens_per_column: ClassVar[int] = 0

    @classmethod
    def of(cls, modifier: SparsityModifierBase) -> Self:
        """With the settings of a modifier of the recipe."""
        return cls()

    @classmethod
    def check(cls, modifier: SparsityModifierBase) -> None:
        """:raises ValueError: for settings that do not go with a list of sparsities"""

    def judge_tokens(self, columns: int) -> int:
        """
        Calibration tokens that allocations should be pruned by when they are judged.

        :param columns: of the widest Linear
        """
        return 0

    @property
    def whole_rows(self) -> bool:
        """Whether of every row it takes so many whole weights, int(columns * s)."""
        return False

    @property
    def keeps_zeros(self) -> bool:
        """Whether it refuses to leave a Linear with fewer zeros than it has."""
        return False

    @property
    def zeroes_unused(self) -> bool:
        """Whether weights of a feature that is always zero go, whatever is asked."""
        return False

    def present(
        self, zero: torch.Tensor, unused: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Zeros in the parts of a weight that are pruned each to the same sparsity.

        :param zero: True where a weight is zero before, (out_features, in_features)
        :param unused: True where a feature is always zero, (in_features,), of a pruner
            that `zeroes_unused`
        :return: share of zeros of every part, and its number of weights: (parts,)
        """
        raise NotImplementedError

    @property
    def masks(self) -> MaskPruner:
        """A pruner that only masks and ranks weights alike, to shortlist by."""
        raise NotImplementedError

    def observe(self, inputs: torch.Tensor) -> torch.Tensor:
        """
        :param inputs: of a Linear, (tokens, in_features)
        :return: what pruning goes by, float32; the sum over parts of the tokens is that
            of the whole
        """
        raise NotImplementedError

    def factored(self, own: torch.Tensor, keep: bool) -> Factor | None:
        """
        What several ranks make of the sum of what they observed, of `hessians` alone.
        Within `distributed.fail_together`.

        :param own: this rank's summand; it may be written over
        :param keep: whether this rank is to have it
        """
        raise NotImplementedError

    def prune(
        self,
        weights: Sequence[torch.Tensor],
        observed: torch.Tensor | Factor,
        sparsities: Sequence[Sequence[float]],
    ) -> list[list[torch.Tensor]]:
        """
        :param weights: of Linears with the same input, each (out_features, in_features)
        :param observed: sum of what `observe` returned, or what `factored` made of it
        :param sparsities: per weight several, each in [0, 1]
        :return: per weight and sparsity a pruned copy, in the weight's dtype
        """
        raise NotImplementedError

    def prune_each(
        self,
        weights: Sequence[torch.Tensor],
        observed: Sequence[torch.Tensor | Factor],
        sparsities: Sequence[Sequence[Sequence[float]]],
    ) -> list[list[list[torch.Tensor]]]:
        """
        `prune` of several sets of inputs.

        :param observed: per set what was observed
        :param sparsities: per set those of every weight, equally many in all sets
        :return: per set what `prune` returns
        """
        return [
            self.prune(weights, one, wanted)
            for one, wanted in zip(observed, sparsities, strict=True)
        ]


class MaskPruner(Pruner):
    """
    A pruner that zeroes the least scores of every row and leaves the other weights
    alone. It scores by a weight and by a_j = Σ x_j² over the tokens that enter the
    Linear.
    """

    def score(self, weight: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
        """
        :param weight: some rows of a Linear's weight, (rows, in_features)
        :param observed: a_j, shape (in_features,)
        :return: at least 0, float32, of the weight's shape; the least go first
        """
        raise NotImplementedError

    @property
    def whole_rows(self) -> bool:
        return True

    def observe(self, inputs: torch.Tensor) -> torch.Tensor:
        return square_sum(inputs)

    @property
    def masks(self) -> MaskPruner:
        return self

    def quantiles(self, weight: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
        """What makes `thresholds` of the same scores quick, on the CPU."""
        found = [
            row_quantiles(self.score(weight[part], observed)).cpu()
            for part in row_chunks(weight)
        ]
        return torch.cat(found)

    def present(
        self, zero: torch.Tensor, unused: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = torch.full((len(zero),), zero.shape[1])
        return zero.float().mean(dim=1), sizes

    def thresholds(
        self,
        weight: torch.Tensor,
        observed: torch.Tensor,
        sparsities: Sequence[float],
        quantiles: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Largest score that goes, per row and sparsity: (rows, sparsities)."""
        counts = [int(weight.shape[1] * s) for s in sparsities]
        found = []
        for part in row_chunks(weight):
            scores = self.score(weight[part], observed)
            if quantiles is None:
                found.append(row_thresholds(scores, counts))
            else:
                known = quantiles[part].to(scores.device)
                found.append(thresholds_between(scores, known, counts))
        return torch.cat(found)

    def masked(
        self, weight: torch.Tensor, observed: torch.Tensor, threshold: torch.Tensor
    ) -> torch.Tensor:
        """:param threshold: (rows, 1), one column of `thresholds`"""
        pruned = torch.empty_like(weight)
        for part in row_chunks(weight):
            kept = self.score(weight[part], observed) > threshold[part]
            # not torch.where, which takes more than twice as long on a CPU
            torch.mul(weight[part], kept, out=pruned[part])
        return pruned

    def masked_and_between(
        self,
        weight: torch.Tensor,
        observed: torch.Tensor,
        threshold: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Both by one look at the scores.

        :param threshold: as of `masked`
        :param low: of a lower sparsity, likewise
        :param high: of a higher one
        :return: the masked weight, and the weights that are masked at the higher
            sparsity but not at the lower, the others zero
        """
        pruned, between = torch.empty_like(weight), torch.empty_like(weight)
        for part in row_chunks(weight):
            scores = self.score(weight[part], observed)
            torch.mul(weight[part], scores > threshold[part], out=pruned[part])
            within = (scores > low[part]) & (scores <= high[part])
            torch.mul(weight[part], within, out=between[part])
        return pruned, between

    def prune(
        self,
        weights: Sequence[torch.Tensor],
        observed: torch.Tensor | Factor,
        sparsities: Sequence[Sequence[float]],
    ) -> list[list[torch.Tensor]]:
        assert isinstance(observed, torch.Tensor)
        pruned = []
        for weight, wanted in zip(weights, sparsities, strict=True):
            weight = weight.detach()
            found = self.thresholds(weight, observed, wanted)
            columns = found.split(1, dim=1)
            pruned.append([self.masked(weight, observed, at) for at in columns])
        return pruned
