"""
What the search is held against, for quality.py: a random direction in its place, and an
evolutionary search at the same number of tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, count_tokens
from absorb_plugin.groups import Groups
from absorb_plugin.pruners import MaskPruner, Pruner, Wanda
from absorb_plugin.pruners.masks import MaskedWeights, block_sparsities
from absorb_plugin.sample_split import SampleSplit
from absorb_plugin.search.budget import Budget
from absorb_plugin.search.descent import Slopes
from absorb_plugin.settings import Effort
from absorb_plugin.signals import Context, Signal
from absorb_plugin.signals.pruner_gradient import PrunerGradient

__all__ = ["RandomSlopes", "by_name", "evolve", "tokens_of"]


# Windows of a generation that judge all offspring, and those that judge the best two.
FEW, MORE = 2, 6
# Of the way of an evolution, whose ends are judged last, beside its start.
PARTS = 3


class RandomSlopes(Signal):
    """
    Slopes that are drawn, so that the descent's length, steps and judge are kept and
    what the gradient knows is not.
    """

    name: ClassVar[str] = "random"

    seed: int = Field(default=0, ge=0)

    def measurer(self, context: Context) -> Callable[[np.ndarray], Slopes]:
        generator = np.random.default_rng(self.seed)
        fixed = generator.normal(size=len(context.groups))
        return lambda allocation: Slopes(fixed, np.zeros_like(fixed), float("nan"))


def tokens_of(
    batches: Sequence[Batch], effort: Effort, pruner: Pruner, columns: int
) -> int:
    """
    Tokens that ours takes before a pruner, beside the inputs' statistics, in those of a
    forward of the model: a round's backward counts as four, also where graphs that are
    kept make it three. Left out are the candidate
    halfway, which the last comparison asks for where the outcome of the search loses,
    and a search that begins anew where the pruner prefers another start.

    :param batches: calibration batches
    :param effort: `AllocationSettings().measuring()`
    :param columns: of the widest Linear
    """
    split = SampleSplit(
        batches,
        effort,
        judged=True,
        by_loss=True,
        pruning_tokens=pruner.judge_tokens(columns),
    )
    pruning, confirm = tokens_in(split.pruning), tokens_in(split.confirm)
    # three candidates: each with pruned weights, and before that with the block's own,
    # the first on all samples, the others on those that are pruned by
    total = 3 * (pruning + confirm) + (pruning + confirm) + 2 * pruning
    rounds, candidates = effort.rounds, 5
    if not isinstance(pruner, MaskPruner):
        # a second stage by the pruner's slopes in place of three points of the path
        masked, own = PrunerGradient.shared_out(effort.rounds)
        rounds, candidates = masked + own, 2
        walks = math.ceil(own * effort.descents / PrunerGradient().refresh)
        total += sum(2 * tokens_in(split.next_pruning()) for _ in range(walks))
    rounds *= effort.descents
    total += candidates * tokens_in(split.search)
    return total + sum(4 * tokens_in(split.next_signal()) for _ in range(rounds))


def tokens_in(samples: Sequence[dict]) -> int:
    return sum(map(count_tokens, samples))


class Masked:
    """
    A model whose weights are masked in place, a Linear at a time.

    :param sums: full name of a Linear -> a_j
    """

    def __init__(
        self, model: PreTrainedModel, blocks: BlockMap, sums: Mapping[str, torch.Tensor]
    ) -> None:
        self._model, self._blocks = model, blocks
        self._dense = {n: x.weight.data for n, x in blocks.linears().items()}
        self._masks = MaskedWeights(blocks, Wanda(), sums)
        self._made: dict[str, tuple[float, torch.Tensor]] = {}

    def set(self, allocation: np.ndarray) -> None:
        """Masks are made anew where the sparsity is not that of the last time."""
        for index, sparsities in block_sparsities(self._blocks, allocation).items():
            block = self._blocks.blocks[index]
            for name, sparsity in sparsities.items():
                full, linear = block.full_name(name), block.linears[name]
                if full not in self._made or self._made[full][0] != sparsity:
                    linear.weight.data = self._dense[full]
                    weight = self._masks.weight(index, name, sparsity)
                    self._made[full] = sparsity, weight
                linear.weight.data = self._made[full][1]

    def restore(self) -> None:
        """The dense weights."""
        for name, linear in self._blocks.linears().items():
            linear.weight.data = self._dense[name]

    @torch.no_grad()
    def log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self._model(input_ids=ids, use_cache=False).logits[:, :-1]
        return log_softmax(logits.float(), dim=-1)


@dataclass(frozen=True)
class Window:
    """
    :param ids: shape (1, tokens)
    :param dense: the dense model's log-probabilities, shape (1, tokens - 1, vocabulary)
    """

    ids: torch.Tensor
    dense: torch.Tensor


class Divergence:
    """KL divergence from the dense model; `spent` counts the tokens of all forwards."""

    def __init__(self, masked: Masked) -> None:
        self._masked = masked
        self.spent = 0

    def windows(self, samples: Iterable[Batch]) -> list[Window]:
        self._masked.restore()
        return [
            Window(ids, self._run(ids).bfloat16())
            for ids in (sample["input_ids"] for sample in samples)
        ]

    def of(self, allocation: np.ndarray, windows: Sequence[Window]) -> float:
        """In nats, summed over all tokens."""
        self._masked.set(allocation)
        return sum(
            float(
                kl_div(
                    self._run(window.ids),
                    window.dense.float(),
                    reduction="sum",
                    log_target=True,
                )
            )
            for window in windows
        )

    def least(
        self, allocations: Sequence[np.ndarray], windows: Sequence[Window], count: int
    ) -> list[np.ndarray]:
        """So many allocations, the best first."""
        found = [self.of(one, windows) for one in allocations]
        return [allocations[i] for i in np.argsort(found, kind="stable")[:count]]

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        self.spent += ids.numel()
        return self._masked.log_probabilities(ids)


def evolve(
    model: PreTrainedModel,
    blocks: BlockMap,
    sums: Mapping[str, torch.Tensor],
    split: SampleSplit,
    budget: Budget,
    *,
    tokens: int,
    seed: int,
    offspring: int = 8,
    steps: tuple[float, float] = (0.2, 0.05),
) -> np.ndarray:
    """
    A level-switch search in the manner of EvoPress (arXiv 2410.14649): each offspring
    moves sparsity by one step between Linears of equal size, one to three times;
    fitness is the KL divergence from the dense model, of all offspring by FEW windows,
    of the best two and their parent by MORE. Every generation has windows of its own,
    as every round of ours has. What is held out chooses at the end, as it does for
    ours: of some points of the path the best.

    :param split: of the samples, into those that measure and those that are held out
    :param budget: its start is uniform
    :param tokens: no generation begins once so many are run, the last choice included
    :param steps: the first and the last, geometric between, as those of ours get
        shorter
    :return: one sparsity per Linear
    """
    masked, generator = Masked(model, blocks, sums), np.random.default_rng(seed)
    divergence, fresh = Divergence(masked), rounds_of(split)
    held_out = [*split.search, *split.confirm]
    # by the dense model, the start and PARTS points
    before = tokens - (PARTS + 2) * tokens_in(held_out)
    path, (first, last) = [budget.uniform()], steps
    try:
        while divergence.spent < before:
            step = first * (last / first) ** (divergence.spent / before)
            few = divergence.windows(islice(fresh, FEW))
            family = [
                mutated(path[-1], budget, generator, step) for _ in range(offspring)
            ]
            best = divergence.least(family, few, 2)
            more = divergence.windows(islice(fresh, MORE))
            path += divergence.least([path[-1], *best], more, 1)
        points = [path[(len(path) - 1) * part // PARTS] for part in range(PARTS + 1)]
        (found,) = divergence.least(points, divergence.windows(held_out), 1)
    finally:
        masked.restore()
    return found


def rounds_of(split: SampleSplit) -> Iterator[dict]:
    """Windows of the signal, of one round after another."""
    while True:
        yield from split.next_signal()


def mutated(
    allocation: np.ndarray, budget: Budget, generator: np.random.Generator, step: float
) -> np.ndarray:
    found = allocation.copy()
    for _ in range(int(min(generator.integers(1, 4), generator.integers(1, 4)))):
        size = generator.choice(np.unique(budget.sizes))
        same = np.flatnonzero(budget.sizes == size)
        if len(same) < 2:
            continue
        one, other = generator.choice(same, 2, replace=False)
        fits = found[one] + step <= budget.high[one]
        if fits and found[other] - step >= budget.low[other]:
            found[one] += step
            found[other] -= step
    return found


def by_name(blocks: BlockMap, allocation: np.ndarray) -> dict[str, float]:
    """Full name of every Linear -> sparsity, in model order."""
    names = Groups.at("linear", blocks).linears
    return dict(zip(names, allocation.tolist(), strict=True))
