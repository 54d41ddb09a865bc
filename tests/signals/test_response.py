"""The response of groups, against copies of the model with masks written in."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import naive, tiny
from helpers.probes import STEP, by_block, place, run
from transformers import PreTrainedModel

from absorb_plugin.calibration import single_samples
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.groups import LEVELS, Groups, named
from absorb_plugin.pruners import Wanda
from absorb_plugin.signals.response import ResponseProbe, ResponseSignal


@pytest.mark.parametrize("level", LEVELS)
def test_response_equals_masked_copies(any_model: PreTrainedModel, level: str) -> None:
    batch, before = tiny.make_batch(padding="right"), tiny.snapshot(any_model)
    where = place(any_model, batch)
    own = by_block(where.blocks, np.linspace(0.3, 0.6, len(where.blocks.prunable)))
    own[::2] = 0.07  # less than the step: relaxed to 0
    groups = Groups.at(level, where.blocks)
    own[groups.of == groups.of[-1]] = 0.02  # less than half of it: pruned more instead
    less = np.maximum(0, own - STEP)
    up = groups.mean(own - less) < STEP / 2
    assert up.any() and not up.all()
    other = np.where(groups.spread(up), own + STEP, less)
    relaxed = [
        np.where(groups.spread(unit) > 0, other, own) for unit in np.eye(len(groups))
    ]
    with torch.no_grad():
        copies = (
            naive.masked(any_model, where.statistics, named(where.blocks, one))
            for one in [own, *relaxed]
        )
        losses = np.array([naive.loss_sums(one, batch).numpy() for one in copies])
    probe = ResponseProbe(where.blocks, groups, where.masks(Wanda()), own, STEP)
    run(any_model, [batch], probe)
    found, tokens = probe.result(), naive.predicted(batch)
    expected = (losses[0] - losses[1:]).sum(axis=1) / tokens
    np.testing.assert_allclose(found.response, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found.response).max() > 1e-3
    assert found.loss == pytest.approx(losses[0].sum() / tokens, rel=1e-5)
    assert found.tokens == tokens
    tiny.assert_untouched(any_model, before)


def test_batch_size_changes_nothing(llama: PreTrainedModel) -> None:
    batch, found = tiny.make_batch(padding="left"), []
    where = place(llama, batch)
    groups = Groups.at("part", where.blocks)
    singles = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    for batches in ([batch], singles, singles[::-1]):
        masks = where.masks(Wanda())
        probe = ResponseProbe(where.blocks, groups, masks, where.flat(), STEP)
        run(llama, batches, probe)
        found.append(probe.result().response)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-3, atol=1e-6)


def test_experts_without_tokens_stay_dense() -> None:
    model = tiny.make_model("qwen3_moe")
    seen, batch = tiny.make_batch(samples=1, tokens=1), tiny.make_batch()
    where = place(model, batch)
    few = {n: x for n, x in naive.square_sums(model, where.blocks, seen).items()}
    few = {n: x for n, x in few.items() if x.any()}
    unseen = where.statistics.keys() - few.keys()
    assert unseen and all(".experts." in name for name in unseen)
    sparse = place(model, batch, few)
    groups = Groups.at("block", where.blocks)
    masks = sparse.masks(Wanda())
    probe = ResponseProbe(where.blocks, groups, masks, where.flat(), STEP)
    run(model, [batch], probe)
    with torch.no_grad():
        copy = naive.masked(model, few, dict.fromkeys(few, 0.5))
        expected = naive.loss_sums(copy, batch).sum() / naive.predicted(batch)
    assert probe.result().loss == pytest.approx(expected.item(), rel=1e-5)


def test_slopes_are_per_what_was_changed(llama: PreTrainedModel) -> None:
    """A group that has nothing to give is not the least sensitive of all for that."""
    batch = tiny.make_batch(6)
    where = place(llama, batch)
    context = SimpleNamespace(
        blocks=where.blocks,
        groups=Groups.at("block", where.blocks),
        masks=where.masks(Wanda()),
        samples=SimpleNamespace(next_signal=lambda: single_samples([batch])),
        runner=ProbeRunner(llama, where.blocks, 2**30),
    )
    measure = ResponseSignal(step=STEP).measurer(context)
    own = by_block(where.blocks, [0.0, 0.5, 0.5])
    # the same interval from both of its ends
    up, down = measure(own), measure(np.where(own == 0, STEP, own))
    assert up.mean[0] == pytest.approx(down.mean[0], rel=1e-4) and up.mean[0] != 0
    assert up.error[0] == pytest.approx(down.error[0], rel=1e-4) and up.error[0] > 0
