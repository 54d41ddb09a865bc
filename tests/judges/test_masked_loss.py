"""Losses under masks, against copies of the model with the masks written in."""

import numpy as np
import torch
from helpers import naive, tiny
from helpers.probes import by_block, place, run
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
    judge = MaskedLoss(where.blocks, Wanda(), where.statistics, candidates)
    run(any_model, [batch], judge)
    losses, tokens = judge.result()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert tokens.tolist() == [11, 9, 7]
    tiny.assert_untouched(any_model, before)
