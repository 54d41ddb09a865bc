"""Masked weights, and an allocation by block."""

import numpy as np
import pytest
import torch
from helpers import naive, tiny
from helpers.probes import place
from transformers import PreTrainedModel

from absorb_plugin.pruners import Wanda
from absorb_plugin.pruners.masks import block_sparsities


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.51, 0.99, 1.0])
def test_masks_zero_the_least_scores_of_every_row(
    llama: PreTrainedModel, sparsity: float
) -> None:
    where = place(llama, tiny.make_batch())
    masks = where.masks(Wanda())
    for full, linear in list(where.blocks.linears().items())[:7]:
        name = full.removeprefix("model.layers.0.")
        weight = linear.weight.detach()
        ranks = naive.order(weight, where.statistics[full])
        expected = torch.where(ranks < int(weight.shape[1] * sparsity), 0.0, weight)
        assert torch.equal(masks.weight(0, name, sparsity), expected)


def test_sparsities_by_block(llama: PreTrainedModel) -> None:
    where = place(llama, tiny.make_batch())
    allocation = np.linspace(0.1, 0.9, 21)
    found = block_sparsities(where.blocks, allocation)
    assert [*found] == [0, 1, 2]
    names = [f"model.layers.{i}.{n}" for i in found for n in found[i]]
    assert names == list(where.blocks.linears())
    assert [s for i in found for s in found[i].values()] == allocation.tolist()
