"""
SparseGPT (https://arxiv.org/abs/2301.00774): what remains of a weight makes up for what
is pruned.

llm-compressor's own function does the same one Linear at a time. Here the Linears that
share an input, as queries, keys and values do, and all sparsities that are asked for,
share the factor and the walk over the columns; so do, but for the factor, several
sets of inputs.

SparseGPT goes by U, the upper Cholesky factor of the inverse Hessian: pruning column i
leaves an error e_i = (w_i − ŵ_i) / U_ii, and e_i U_ij is taken from the columns j after
it, so W − Ŵ = E U in the end. Here T = U⁻¹ is used, which is a factor of the Hessian
itself, H = T Tᵀ: E = (W − Ŵ) T says what the columns before a block have left to it, by
one product, and U is made of the triangles on T's diagonal alone. A Hessian is factored
once and never inverted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase

from absorb_plugin.precision import gram
from absorb_plugin.pruners.base import MaskPruner, Pruner
from absorb_plugin.pruners.thresholds import global_threshold
from absorb_plugin.pruners.wanda import Wanda

__all__ = ["SparseGPT"]

GROUP = 32  # columns: what a processor's cache holds of many rows
# Tokens make a Hessian of no higher rank than their number.
JUDGE_TOKENS = 4096


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """
    It observes the Hessian Σ x xᵀ over the tokens that enter a Linear.

    :param block_size: columns among which a share of the weights is pruned
    :param dampening: of the Hessian, relative to the mean of its diagonal
    :param preserve: what is zero already stays so, and counts
    """

    block_size: int = 128
    dampening: float = 0.01
    preserve: bool = False

    name: ClassVar[str] = "sparsegpt"
    modifier: ClassVar[type[SparsityModifierBase]] = SparseGPTModifier
    rank_statistics: ClassVar[str] = "_hessians"
    hessians: ClassVar[bool] = True
    # docs/benchmarks.md: with fewer it is worse than Wanda
    tokens_per_column: ClassVar[int] = 4

    @classmethod
    def of(cls, modifier: SparsityModifierBase) -> "SparseGPT":
        assert isinstance(modifier, SparseGPTModifier)
        if modifier.block_size < 1:
            raise ValueError(
                f"SparseGPTModifier has block_size={modifier.block_size}: it prunes so "
                "many columns at a time, 128 by default"
            )
        return cls(
            modifier.block_size,
            modifier.dampening_frac or 0.0,
            bool(modifier.preserve_sparsity_mask),
        )

    def judge_tokens(self, columns: int) -> int:
        return max(JUDGE_TOKENS, columns)

    @property
    def keeps_zeros(self) -> bool:
        return self.preserve

    @property
    def zeroes_unused(self) -> bool:
        return True

    def present(
        self, zero: torch.Tensor, unused: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Without `preserve` too: where a block of columns has more zeros than are asked
        for, nothing is pruned in it, and no error fills the zeros after it. From the
        first block that has fewer, it does. So a block counts with the least share of
        those before it and its own: never too much, and not falling in what is asked.
        No error comes to features that are always zero.
        """
        if unused is not None and self.preserve:
            zero = zero | unused
        parts = zero.split(self.block_size, dim=1)
        shares = torch.stack([part.float().mean() for part in parts])
        if not self.preserve:
            shares = shares.cummin(dim=0).values
            if unused is not None:
                gone = [part.float().mean() for part in unused.split(self.block_size)]
                shares = torch.maximum(shares, torch.stack(gone))
        return shares, torch.tensor([part.numel() for part in parts])

    @property
    def masks(self) -> MaskPruner:
        return Wanda()

    def observe(self, inputs: torch.Tensor) -> torch.Tensor:
        return gram(inputs)

    def prune(
        self,
        weights: Sequence[torch.Tensor],
        observed: torch.Tensor,
        sparsities: Sequence[Sequence[float]],
    ) -> list[list[torch.Tensor]]:
        (pruned,) = self.prune_each(weights, [observed], [sparsities])
        return pruned

    def prune_each(
        self,
        weights: Sequence[torch.Tensor],
        observed: Sequence[torch.Tensor],
        sparsities: Sequence[Sequence[Sequence[float]]],
    ) -> list[list[list[torch.Tensor]]]:
        copies = [w for w, wanted in zip(weights, sparsities[0]) for _ in wanted]
        rows, sets = [len(copy) for copy in copies], len(observed)
        # columns are walked through one by one: they lie together here
        columns = torch.cat([copy.detach().float() for copy in copies]).t()
        columns = columns.expand(sets, -1, -1)
        columns = columns.clone(memory_format=torch.contiguous_format)
        factor = columns.new_empty(sets, columns.shape[1], columns.shape[1])
        for own, out, hessian in zip(columns, factor, observed, strict=True):
            own[self._factor(hessian, out)] = 0
        flat = [[s for wanted in of_set for s in wanted] for of_set in sparsities]
        self._walk(columns, factor, rows, flat)
        del factor
        pruned = iter(
            # a copy, for in float32 each would keep the columns of all
            part.t().to(copy.dtype, copy=True)
            for own in columns
            for part, copy in zip(own.split(rows, dim=1), copies, strict=True)
        )
        return [
            [[next(pruned) for _ in wanted] for wanted in of_set]
            for of_set in sparsities
        ]

    def _walk(
        self,
        columns: torch.Tensor,
        factor: torch.Tensor,
        rows: Sequence[int],
        sparsities: Sequence[Sequence[float]],
    ) -> None:
        """
        :param columns: (sets, in_features, all rows), pruned in place
        :param factor: T, (sets, in_features, in_features)
        :param rows: how many of them belong to each sparsity
        :param sparsities: of every set
        """
        features = columns.shape[1]
        moved = torch.empty_like(columns)  # E U
        for start in range(0, features, self.block_size):
            here = slice(start, min(start + self.block_size, features))
            own = _inverse(factor[:, here, here])
            part, diagonal = columns[:, here], own.diagonal(dim1=1, dim2=2)
            moved[:, here] = part
            # first the two that are small
            came = (own.mT @ factor[:, :start, here].mT) @ moved[:, :start]
            zeros = part == 0 if self.preserve else None
            part += came if zeros is None else came * ~zeros
            scores = (part / diagonal[:, :, None]).square_()
            masks = [
                _masks(one, rows, wanted, None if zeros is None else zeros[number])
                for number, (one, wanted) in enumerate(
                    zip(scores, sparsities, strict=True)
                )
            ]
            del scores
            errors = _prune_columns(part, torch.stack(masks), own)
            moved[:, here] -= part
            if zeros is not None:  # nothing came to them, and E U says it had
                passed_on = own.mT @ errors - came
                moved[:, here] = torch.where(zeros, passed_on, moved[:, here])

    def _factor(self, observed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """
        T upper of H = T Tᵀ, which is the Cholesky factor of H turned round.

        :param out: where to put it, (in_features, in_features)
        :return: which features are always zero
        """
        turned = observed.flip(0, 1)
        diagonal = turned.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1
        diagonal += self.dampening * diagonal.mean()
        try:
            lower = torch.linalg.cholesky(turned)
        except torch.linalg.LinAlgError:
            # as llm-compressor does, which warns of it in the run itself
            lower = torch.eye(len(turned), device=turned.device)
        del turned, diagonal
        out.copy_(lower.flip(0, 1))
        return dead.flip(0)


def _inverse(triangles: torch.Tensor) -> torch.Tensor:
    """:param triangles: upper ones, (sets, n, n)"""
    one = torch.eye(triangles.shape[1], device=triangles.device)
    return torch.linalg.solve_triangular(triangles, one, upper=True)


def _masks(
    scores: torch.Tensor,
    rows: Sequence[int],
    sparsities: Sequence[float],
    zero: torch.Tensor | None,
) -> torch.Tensor:
    """Where to prune, of the shape of `scores`: (columns, all rows)."""
    parts = scores.split(rows, dim=1)
    if zero is None:
        masks = [_least(part, s) for part, s in zip(parts, sparsities, strict=True)]
    else:
        zeros = zero.split(rows, dim=1)
        masks = [
            # extended where more is asked for than there is
            _least(part * ~old, s) if int(part.numel() * s) > old.sum() else old
            for part, s, old in zip(parts, sparsities, zeros, strict=True)
        ]
    return torch.cat(masks, dim=1)


def _least(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Where the least ⌊n·sparsity⌋ + 1 of n scores are: SparseGPT's threshold."""
    rank = int(scores.numel() * sparsity)
    if rank == scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    return scores <= global_threshold(scores, rank)


def _prune_columns(
    part: torch.Tensor, mask: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    """
    Prune some columns in place, each column's error going to those after it: one by
    one to those of its group, at once to those after the group.

    :param part: (sets, columns, rows)
    :param mask: True where to prune, of the same shape
    :param inverse: (sets, columns, columns), upper triangles
    :return: what columns after `part` have to make up for, of its shape
    """
    errors = torch.zeros_like(part)
    # in float32 from the first: torch divides booleans a hundred times as slowly
    share = mask.float() / inverse.diagonal(dim1=1, dim2=2)[:, :, None]
    columns = part.shape[1]
    for start in range(0, columns, GROUP):
        stop = min(start + GROUP, columns)
        for i in range(start, stop):
            torch.mul(part[:, i], share[:, i], out=errors[:, i])
            after = slice(i + 1, stop)
            if len(part) == 1:  # what a CPU does faster
                part[0, after].addr_(inverse[0, i, after], errors[0, i], alpha=-1)
                continue
            passed_on = inverse[:, i, after, None]
            part[:, after].baddbmm_(passed_on, errors[:, i, None], alpha=-1)
        own = errors[:, start:stop]
        part[:, stop:].baddbmm_(inverse[:, start:stop, stop:].mT, own, alpha=-1)
    part *= ~mask  # which a CPU does in a twentieth of the time of filling in zeros
    return errors
