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

from absorb_plugin.devices import launches
from absorb_plugin.forward.memory import PATTERN, TABLED
from absorb_plugin.precision import gram
from absorb_plugin.pruners.base import MaskPruner, Pruner
from absorb_plugin.pruners.factor import Factor, factored, factored_together
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
    factors_together: ClassVar[bool] = True
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

    def factored(self, own: torch.Tensor, keep: bool) -> Factor | None:
        return factored_together(own, self.dampening, keep)

    def prune(
        self,
        weights: Sequence[torch.Tensor],
        observed: torch.Tensor | Factor,
        sparsities: Sequence[Sequence[float]],
    ) -> list[list[torch.Tensor]]:
        (pruned,) = self.prune_each(weights, [observed], [sparsities])
        return pruned

    def prune_each(
        self,
        weights: Sequence[torch.Tensor],
        observed: Sequence[torch.Tensor | Factor],
        sparsities: Sequence[Sequence[Sequence[float]]],
    ) -> list[list[list[torch.Tensor]]]:
        copies = [w for w, wanted in zip(weights, sparsities[0]) for _ in wanted]
        rows, sets = [len(copy) for copy in copies], len(observed)
        # columns are walked through one by one: they lie together here
        columns = torch.cat([copy.detach().float() for copy in copies]).t()
        columns = columns.expand(sets, -1, -1)
        columns = columns.clone(memory_format=torch.contiguous_format)
        factor = self._triangles(columns, observed)
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

    def _triangles(
        self, columns: torch.Tensor, observed: Sequence[torch.Tensor | Factor]
    ) -> torch.Tensor:
        """
        T of every set: (sets, in_features, in_features).

        :param columns: as of `_walk`; those of features that are always zero become so
        """
        features = columns.shape[1]
        only = observed[0]
        if len(observed) == 1 and isinstance(only, Factor):
            columns[0, only.unused] = 0
            return only.triangle[None]
        triangles = columns.new_empty(len(observed), features, features)
        for own, out, one in zip(columns, triangles, observed, strict=True):
            if isinstance(one, Factor):
                out.copy_(one.triangle)
                own[one.unused] = 0
            else:
                own[factored(one, self.dampening, out).unused] = 0
        return triangles


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
    Prune some columns in place, each column's error going to those after it.

    :param part: (sets, columns, rows)
    :param mask: True where to prune, of the same shape
    :param inverse: (sets, columns, columns), upper triangles
    :return: what columns after `part` have to make up for, of its shape
    """
    errors = torch.zeros_like(part)
    # a column one by one is two launches, and there are tens of thousands of them
    prune = _by_patterns if launches(part.device) else _one_by_one
    prune(part, mask, inverse, errors)
    part *= ~mask  # which a CPU does in a twentieth of the time of filling in zeros
    return errors


def _one_by_one(
    part: torch.Tensor, mask: torch.Tensor, inverse: torch.Tensor, errors: torch.Tensor
) -> None:
    """
    As `_prune_columns`, but for the zeros: each error goes at once to the columns of
    its group, and of all of a group to those after it.

    :param errors: of zeros, filled in
    """
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


def _by_patterns(
    part: torch.Tensor, mask: torch.Tensor, inverse: torch.Tensor, errors: torch.Tensor
) -> None:
    """
    As `_one_by_one`, eight columns at a time: which of them a row loses is one of 256
    patterns, and of each the errors are one matrix times the columns.
    """
    sets, columns, rows = part.shape
    whole = columns - columns % PATTERN
    for start in range(0, whole, PATTERN):
        if start % TABLED == 0:
            some = slice(start, min(start + TABLED, whole))
            tables = _error_tables(inverse[:, some, some]).unbind()
            patterns = _patterns(mask[:, some]).unbind()
        here, group = slice(start, start + PATTERN), start % TABLED // PATTERN
        found = tables[group].index_select(1, patterns[group])
        found = found.view(PATTERN, PATTERN, sets, rows)
        found *= part[:, here].transpose(0, 1)
        own = errors[:, here]
        torch.sum(found, dim=1, out=own.transpose(0, 1))
        # their own columns too, of which those that stay have made up for others
        part[:, start:].baddbmm_(inverse[:, here, start:].mT, own, alpha=-1)
    rest = slice(whole, columns)
    _one_by_one(part[:, rest], mask[:, rest], inverse[:, rest, rest], errors[:, rest])


def _error_tables(inverse: torch.Tensor) -> torch.Tensor:
    """
    Row i of an error matrix says what the columns of a group, as they came, add to the
    error of its column i. With m for what is pruned, e_i = m_i (w_i − Σ_j<i e_j U_ji) /
    U_ii, a triangular system for each m.

    :param inverse: U, (sets, columns, columns)
    :return: (groups, i · j, sets · patterns)
    """
    groups = (inverse.shape[1] // PATTERN, PATTERN)
    own = inverse.unflatten(2, groups).unflatten(1, groups).diagonal(dim1=1, dim2=3)
    own = own.permute(0, 3, 2, 1)[:, :, None]  # (sets, groups, 1, i, j), lower
    columns = torch.arange(PATTERN, device=inverse.device)
    pruned = torch.arange(2**PATTERN, device=inverse.device)[:, None] >> columns & 1
    share = pruned / own.diagonal(dim1=3, dim2=4)
    system = own * share[..., None]  # whose diagonal is taken for one
    errors = torch.linalg.solve_triangular(
        system, share.diag_embed(), upper=False, unitriangular=True
    )
    return errors.permute(1, 3, 4, 0, 2).flatten(1, 2).flatten(2, 3).contiguous()


def _patterns(mask: torch.Tensor) -> torch.Tensor:
    """
    :param mask: (sets, columns, rows)
    :return: (groups, sets · rows), where in a table of `_error_tables` to look
    """
    sets, columns, _ = mask.shape
    powers = 2 ** torch.arange(PATTERN, device=mask.device, dtype=torch.int32)
    bits = mask.unflatten(1, (columns // PATTERN, PATTERN)) * powers[:, None]
    patterns = bits.sum(2, dtype=torch.int32)
    first = torch.arange(sets, device=mask.device, dtype=torch.int32) * 2**PATTERN
    return (patterns + first[:, None, None]).transpose(0, 1).flatten(1)
