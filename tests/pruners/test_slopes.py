"""How weights change with sparsity, under masks and as a pruner made them."""

import numpy as np
import pytest
import torch
from helpers import naive, tiny
from helpers.probes import place
from transformers import PreTrainedModel

from absorb_plugin.pruners import Wanda
from absorb_plugin.pruners.slopes import MaskedSlopes, PrunedSlopes, band


def test_a_slope_is_the_change_per_share_of_weights_that_went(
    llama: PreTrainedModel,
) -> None:
    """At the ends of [0, 1] the band is cut, and the slope is not halved."""
    where = place(llama, tiny.make_batch())
    name, weight = "mlp.up_proj", llama.model.layers[1].mlp.up_proj.weight.detach()
    gradient, columns = torch.randn_like(weight), weight.shape[1]
    ranks = naive.order(weight, where.statistics[f"model.layers.1.{name}"])
    for sparsity in (0.0, 0.5, 1.0):
        slopes = MaskedSlopes(
            where.blocks, where.masks(Wanda()), where.flat(sparsity), 0.1
        )
        low, high = (int(columns * s) for s in band(sparsity, 0.1))
        changed = (ranks >= low) & (ranks < high)
        expected = -(gradient * weight)[changed].sum() * columns / (high - low)
        change = slopes.change(1, name)
        assert change is not None
        found = (gradient * change.matrix).sum().item() * change.factor
        assert found == pytest.approx(expected.item(), 1e-4)


def test_the_weight_made_with_a_change_is_handed_out_once(
    llama: PreTrainedModel,
) -> None:
    where = place(llama, tiny.make_batch())
    masks, name = where.masks(Wanda()), "mlp.up_proj"
    slopes = MaskedSlopes(where.blocks, masks, where.flat(0.5), 0.1)
    slopes.rank(1)
    scored: list[int] = []
    score = Wanda.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wanda, "score", lambda *args: scored.append(1) or score(*args))
        slopes.change(1, name)
        first = slopes.weights(1)[name]()
        assert len(scored) == 1
        second = slopes.weights(1)[name]()
        assert len(scored) == 2
    assert torch.equal(first, second) and first is not second
    assert torch.equal(first, masks.weight(1, name, 0.5))


def test_pruned_weights_between_those_that_were_made(llama: PreTrainedModel) -> None:
    """A step further on, the same weights serve: in part those of the other side."""
    blocks = place(llama, tiny.make_batch()).blocks.restrict(
        ["model.layers.1.mlp.up_proj"]
    )
    name, step = "mlp.up_proj", 0.1
    own, less, more = (torch.randn(48, 32) for _ in range(3))
    less[0, :3], own[0, :4], more[0, :5] = 0, 0, 0
    made_at, kept = np.array([0.5]), {1: {name: [own, less, more]}}
    made = PrunedSlopes(blocks, kept, made_at, made_at, step=step)
    for allocation, expected in (
        (0.5, own),
        (0.55, (own + more) / 2),
        (0.4, less),
        (0.475, own + (less - own) / 4),
    ):
        near = made.at(np.array([allocation]))
        torch.testing.assert_close(near.weights(1)[name](), expected)
        change = near.change(1, name)
        assert change is not None
        found = change.matrix * change.factor
        torch.testing.assert_close(found, (more - less) * (48 * 32 / 2))
    assert made.at(np.array([0.52])).identity() != made.identity()
    assert dict(made.weights(0)) == {}
