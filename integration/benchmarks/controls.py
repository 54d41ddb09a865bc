"""
What the search is held against, for quality.py: a random direction in its place, and an
evolutionary search at the same number of tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from absorb_plugin.pruners.weights import MaskedWeights, block_sparsities
from absorb_plugin.sample_split import SampleSplit
from absorb_plugin.search.budget import Budget
from absorb_plugin.search.descent import Slopes
from absorb_plugin.settings import Effort
from absorb_plugin.signals import Setting, Signal
from absorb_plugin.signals.gradient import PrunerGradient

__all__ = ["RandomSlopes", "by_name", "evolve", "tokens_of"]


class RandomSlopes(Signal):
    """
    Slopes that are drawn, so that the descent's length, steps and judge are kept and
    what the gradient knows is not.
    """

    name: ClassVar[str] = "random"

    seed: int = Field(default=0, ge=0)

    def measurer(self, setting: Setting) -> Callable[[np.ndarray], Slopes]:
        generator = np.random.default_rng(self.seed)
        fixed = generator.normal(size=len(setting.groups))
        return lambda allocation: Slopes(fixed, np.zeros_like(fixed), float("nan"))


def tokens_of(
    batches: Sequence[Batch], effort: Effort, pruner: Pruner, columns: int
) -> int:
    """
    Tokens that ours takes before a pruner, beside the inputs' statistics, in those of a
    forward of the model: a round's backward counts as four. Left out is the candidate
    halfway, which the last comparison asks for where the outcome of the search loses.

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
        own, candidates = max(1, effort.rounds // 2), 2
        rounds += own
        for _ in range(math.ceil(own / PrunerGradient().refresh)):
            total += 2 * tokens_in(split.next_pruning())
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
        self._at: dict[str, float] = {}

    @contextmanager
    def dense(self) -> Iterator[None]:
        """The weights come back as they were, whatever happens."""
        try:
            yield
        finally:
            for name, linear in self._blocks.linears().items():
                linear.weight.data = self._dense[name]

    def set(self, allocation: np.ndarray) -> None:
        """Mask what differs from before."""
        for index, sparsities in block_sparsities(self._blocks, allocation).items():
            block = self._blocks.blocks[index]
            for name, sparsity in sparsities.items():
                full = block.full_name(name)
                if self._at.get(full) == sparsity:
                    continue
                linear = block.linears[name]
                linear.weight.data = self._dense[full]
                linear.weight.data = self._masks.weight(index, name, sparsity)
                self._at[full] = sparsity

    @torch.no_grad()
    def log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self._model(input_ids=ids, use_cache=False).logits[:, :-1]
        return log_softmax(logits.float(), dim=-1)


def evolve(
    model: PreTrainedModel,
    blocks: BlockMap,
    sums: Mapping[str, torch.Tensor],
    samples: Sequence[torch.Tensor],
    budget: Budget,
    *,
    tokens: int,
    seed: int,
    offspring: int = 8,
    step: float = 0.05,
) -> np.ndarray:
    """
    A level-switch search in the manner of EvoPress (arXiv 2410.14649): each offspring
    moves sparsity by one step between Linears of equal size, one to three times;
    fitness is the KL divergence from the dense model, of all on two samples, and of the
    best two on eight.

    :param samples: token ids, each (1, tokens), of one length
    :param budget: its start is uniform
    :param tokens: the search ends when it has run so many
    :return: one sparsity per Linear
    """
    masked, generator = Masked(model, blocks, sums), np.random.default_rng(seed)
    spent, current, turn = 0, budget.uniform(), 0
    with masked.dense():
        targets = [masked.log_probabilities(ids).bfloat16() for ids in samples]
        spent += sum(ids.numel() for ids in samples)

        def divergence(allocation: np.ndarray, chosen: Sequence[int]) -> float:
            nonlocal spent
            masked.set(allocation)
            total = 0.0
            for number in chosen:
                found = masked.log_probabilities(samples[number])
                target = targets[number].float()
                total += float(kl_div(found, target, reduction="sum", log_target=True))
                spent += samples[number].numel()
            return total

        while spent < tokens:
            few = [(2 * turn + i) % len(samples) for i in range(2)]
            turn += 1
            family = [current] + [
                mutated(current, budget, generator, step) for _ in range(offspring)
            ]
            fitness = [divergence(one, few) for one in family]
            best = np.argsort(fitness)[:2]
            more = list(range(min(8, len(samples))))
            final = [divergence(family[i], more) for i in best]
            current = family[best[int(np.argmin(final))]]
    return current


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
