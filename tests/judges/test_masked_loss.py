"""Losses under masks, against copies of the model with the masks written in."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import naive, tiny
from helpers.probes import JUDGES, by_block, make_judge, place, run
from transformers import PreTrainedModel

from absorb_plugin.groups import named
from absorb_plugin.judges import MaskedLoss
from absorb_plugin.pruners import Wanda


def test_losses_equal_masked_copies(any_model: PreTrainedModel) -> None:
    batch, before = tiny.make_batch(padding="right"), tiny.snapshot(any_model)
    where = place(any_model, batch)
    own = by_block(where.blocks, np.linspace(0.3, 0.6, len(where.blocks.prunable)))
    each = np.random.default_rng(0).uniform(0.1, 0.9, len(own))  # every Linear its own
    candidates = [own, own[::-1], np.zeros_like(own), np.full_like(own, 0.95), each]
    with torch.no_grad():
        copies = [
            naive.masked(any_model, where.statistics, named(where.blocks, one))
            for one in candidates
        ]
        expected = [naive.loss_sums(copy, batch).numpy() for copy in copies]
    judge = MaskedLoss(where.blocks, where.masks(Wanda()), candidates)
    run(any_model, [batch], judge)
    losses, tokens = judge.result()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert tokens.tolist() == [11, 9, 7]
    tiny.assert_untouched(any_model, before)


@dataclass(frozen=True)
class Overflowing(Wanda):
    """Where it prunes anything, the rest is too large for any float."""

    def masked(
        self, weight: torch.Tensor, observed: torch.Tensor, threshold: torch.Tensor
    ) -> torch.Tensor:
        pruned = super().masked(weight, observed, threshold)
        return pruned if pruned.all() else pruned / 0.0


@pytest.mark.parametrize("kind", JUDGES)
def test_an_overflow_is_a_bad_loss_whichever_candidate_it_is_of(
    kind: str, llama: PreTrainedModel
) -> None:
    batch = tiny.make_batch(4)
    where = place(llama, batch)
    dense, half = where.flat(0.0), where.flat()

    def losses(*candidates: np.ndarray) -> list[bool]:
        judge = make_judge(kind, where, Overflowing(), candidates)
        run(llama, [batch], judge)
        return np.isfinite(judge.result()[0].sum(axis=1)).tolist()

    assert losses(half, dense) == [False, True]
    assert losses(dense, half) == [True, False]
