"""What is measured under masks, against copies of the model with masks written in."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from absorb_plugin.gradient import GradientProbe
from absorb_plugin.masks import BlockMasks
from absorb_plugin.response import CandidateScores, ResponseProbe
from absorb_plugin.statistics import InputStatistics
from helpers import naive, tiny
from test_sweep import ride
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from absorb_plugin import memory
from absorb_plugin.blocks import BlockMap, find_blocks

STEP = 0.1
Sums = dict[str, torch.Tensor]


def allocation_of(blocks: BlockMap) -> np.ndarray:
    return np.linspace(0.3, 0.6, len(blocks.prunable))


@pytest.fixture
def prepared(any_model: PreTrainedModel) -> tuple[PreTrainedModel, BlockMap, dict]:
    return any_model, find_blocks(any_model), tiny.make_batch(padding="right")


@torch.no_grad()
def naive_losses(
    model: PreTrainedModel, blocks: BlockMap, sums: Sums, batch: dict, each: list
) -> np.ndarray:
    """Loss sums, shape (allocations, samples)."""
    return np.array(
        [
            naive.loss_sums(
                naive.masked(model, sums, naive.per_linear(blocks, sparsities)), batch
            ).numpy()
            for sparsities in each
        ]
    )


def sums_of(model: PreTrainedModel, blocks: BlockMap, batch: dict) -> Sums:
    watcher = InputStatistics(blocks)
    ride(model, [batch], watcher)
    return watcher.input_square_sums()


def test_response_equals_masked_copies(
    prepared: tuple[PreTrainedModel, BlockMap, dict],
) -> None:
    model, blocks, batch = prepared
    sums, before = sums_of(model, blocks, batch), tiny.snapshot(model)
    own = allocation_of(blocks)
    relaxed = [own - STEP * unit for unit in np.eye(len(own))]
    losses = naive_losses(model, blocks, sums, batch, [own, *relaxed])
    probe = ResponseProbe(blocks, sums, own, STEP)
    ride(model, [batch], probe)
    found = probe.response()
    tokens = naive.predicted(batch)
    expected = (losses[0] - losses[1:]).sum(axis=1) / tokens
    np.testing.assert_allclose(found.response, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found.response).max() > 1e-3
    assert found.loss == pytest.approx(losses[0].sum() / tokens, rel=1e-5)
    assert found.tokens == tokens
    tiny.assert_untouched(model, before)


def test_scores_equal_masked_copies(
    prepared: tuple[PreTrainedModel, BlockMap, dict],
) -> None:
    model, blocks, batch = prepared
    sums, before = sums_of(model, blocks, batch), tiny.snapshot(model)
    own = allocation_of(blocks)
    candidates = [own, own[::-1], np.zeros_like(own), np.full_like(own, 0.95)]
    expected = naive_losses(model, blocks, sums, batch, candidates)
    scores = CandidateScores(blocks, sums, candidates)
    ride(model, [batch], scores)
    losses, tokens = scores.losses()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert tokens.tolist() == [11, 9, 7]
    tiny.assert_untouched(model, before)


def test_slope_equals_autograd_through_a_masked_copy(
    prepared: tuple[PreTrainedModel, BlockMap, dict],
) -> None:
    model, blocks, batch = prepared
    sums, before = sums_of(model, blocks, batch), tiny.snapshot(model)
    own = allocation_of(blocks)
    probe = GradientProbe(blocks, sums, own, STEP)
    ride(model, [batch], probe)

    pruned = naive.masked(model, sums, naive.per_linear(blocks, own))
    total = naive.loss_sums(pruned, batch).sum()
    total.backward()
    tokens = naive.predicted(batch)
    expected = np.zeros(len(own))
    for row, (block, s) in enumerate(zip(blocks.blocks, own, strict=True)):
        for name in block.linears:
            full = block.full_name(name)
            weight = model.get_submodule(full).weight.detach()
            gradient = pruned.get_submodule(full).weight.grad
            ranks = naive.order(weight, sums[full])
            columns = weight.shape[1]
            low, high = int(columns * (s - STEP)), int(columns * (s + STEP))
            band = (ranks >= low) & (ranks < high)
            effect = float((gradient * weight)[band].double().sum())
            expected[row] -= effect * columns / (high - low) / block.parameters
    np.testing.assert_allclose(probe.slope(), expected / tokens, rtol=1e-3, atol=1e-9)
    assert probe.loss() == pytest.approx(total.item() / tokens, rel=1e-5)
    tiny.assert_untouched(model, before)


def test_slope_is_that_of_the_loss(llama: PreTrainedModel) -> None:
    """Where few and small weights are masked, it is close to a finite difference."""
    for parameter in find_blocks(llama).linears().values():
        parameter.weight.data *= 0.5
    blocks, batch = find_blocks(llama), tiny.make_batch(samples=8, tokens=24)
    sums = sums_of(llama, blocks, batch)
    own, step = np.full(3, 0.25), 0.125
    probe = GradientProbe(blocks, sums, own, step)
    ride(llama, [batch], probe)
    shifted = [own + sign * step * unit for unit in np.eye(3) for sign in (1, -1)]
    losses = naive_losses(llama, blocks, sums, batch, shifted).sum(axis=1)
    difference = (losses[::2] - losses[1::2]) / (2 * step * naive.predicted(batch))
    slope = probe.slope() * blocks.parameters
    np.testing.assert_allclose(slope, difference, rtol=0.25, atol=2e-3)
    assert np.abs(slope).max() > 0.01


@pytest.mark.parametrize("passenger", [ResponseProbe, GradientProbe])
def test_batch_size_changes_nothing(
    llama: PreTrainedModel, passenger: Callable
) -> None:
    blocks, batch = find_blocks(llama), tiny.make_batch(padding="left")
    sums, own = sums_of(llama, blocks, batch), np.full(3, 0.5)
    singles = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    found = []
    for batches in ([batch], singles, singles[::-1]):
        probe = passenger(blocks, sums, own, STEP)
        ride(llama, batches, probe)
        if isinstance(probe, ResponseProbe):
            found.append(probe.response().response)
        else:
            found.append(probe.slope())
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-3, atol=1e-6)


def test_statistics_equal_hooks(
    prepared: tuple[PreTrainedModel, BlockMap, dict],
) -> None:
    model, blocks, batch = prepared
    expected = naive.square_sums(model, blocks, batch)
    found = sums_of(model, blocks, batch)
    assert found.keys() == expected.keys() == blocks.linears().keys()
    for name, total in expected.items():
        torch.testing.assert_close(found[name], total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("passenger", [ResponseProbe, GradientProbe])
def test_experts_without_tokens_stay_dense(passenger: Callable) -> None:
    model = tiny.make_model("qwen3_moe")
    blocks, seen = find_blocks(model), tiny.make_batch(samples=1, tokens=1)
    sums = sums_of(model, blocks, seen)
    unseen = blocks.linears().keys() - sums.keys()
    assert unseen and all(".experts." in name for name in unseen)
    batch, own = tiny.make_batch(), np.full(3, 0.5)
    probe = passenger(blocks, sums, own, STEP)
    ride(model, [batch], probe)
    dense = {name: 0.0 for name in unseen} | dict.fromkeys(sums, 0.5)
    sums |= {n: torch.zeros(blocks.linears()[n].in_features) for n in unseen}
    with torch.no_grad():
        expected = naive.loss_sums(naive.masked(model, sums, dense), batch).sum()
    found = probe.loss() if passenger is GradientProbe else probe.response().loss
    assert found == pytest.approx(expected.item() / naive.predicted(batch), rel=1e-5)


def test_offsets_shift_single_linears(llama: PreTrainedModel) -> None:
    blocks, batch = find_blocks(llama), tiny.make_batch()
    sums = sums_of(llama, blocks, batch)
    offsets = {name: 0.2 if "mlp" in name else -0.7 for name in blocks.linears()}
    own = np.full(3, 0.5)
    scores = CandidateScores(blocks, sums, [own], offsets)
    ride(llama, [batch], scores)
    sparsities = {name: max(0.0, 0.5 + offset) for name, offset in offsets.items()}
    with torch.no_grad():
        expected = naive.loss_sums(naive.masked(llama, sums, sparsities), batch)
    np.testing.assert_allclose(scores.losses()[0][0], expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.51, 0.99, 1.0])
def test_masks_zero_the_least_scores_of_every_row(sparsity: float) -> None:
    linear = torch.nn.Linear(20, 6)
    square_sum = torch.rand(20)
    masks = BlockMasks({"x": linear}, {"x": square_sum})
    weight = masks.masked("x", sparsity)
    ranks = naive.order(linear.weight.detach(), square_sum)
    expected = torch.where(ranks < int(20 * sparsity), 0.0, linear.weight.detach())
    assert torch.equal(weight, expected)


def test_cross_entropy_in_chunks(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = tiny.make_batch(padding="right")
    blocks, totals = find_blocks(llama), []
    sums = sums_of(llama, blocks, batch)
    for chunk in (memory.CHUNK_BYTES, 4 * tiny.VOCABULARY * 3 * 4, 1):
        monkeypatch.setattr(memory, "CHUNK_BYTES", chunk)
        scores = CandidateScores(blocks, sums, [np.zeros(3)])
        ride(llama, [batch], scores)
        totals.append(scores.losses()[0][0])
    with torch.no_grad():
        logits = llama(**batch).logits
    for sample, used in enumerate((12, 10, 8)):
        ids = batch["input_ids"][sample, 1:used]
        expected = cross_entropy(logits[sample, : used - 1], ids, reduction="sum")
        for total in totals:
            assert total[sample] == pytest.approx(expected.item(), rel=1e-5)
