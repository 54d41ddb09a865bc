"""
The slope of the loss in every Linear's sparsity: against autograd through pruned
copies, and against finite differences of the loss.
"""

import copy
import gc
import itertools
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from compressed_tensors.offload import set_onload_device
from helpers import naive, runs, tiny
from helpers.fake_accelerator import fake_accelerator
from helpers.live_bytes import live_bytes
from helpers.probes import PRUNERS, STEP, Place, by_block, first_linears, place, run
from helpers.upstream import as_upstream, inputs_of, pruned_copy
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.calibration import Batch
from absorb_plugin.cpu import bfloat16_is_slow
from absorb_plugin.forward import head
from absorb_plugin.forward import run as run_module
from absorb_plugin.forward.graphs import KeptGraphs
from absorb_plugin.forward.memory import footprint
from absorb_plugin.groups import Groups, named
from absorb_plugin.pruners import Pruner, SparseGPT, Wanda
from absorb_plugin.pruners.slopes import MaskedSlopes, PrunedSlopes, band
from absorb_plugin.sample_split import SampleSplit
from absorb_plugin.search.standard_error import standard_error
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.signals.base import Context
from absorb_plugin.signals.gradient import Gradient, GradientProbe, LinearSlopes
from absorb_plugin.signals.pruned_model import PrunedModel

GIB = 2**30
bfloat16_is_slow()  # tried out once, and that is no part of any run


def test_slope_equals_autograd_through_a_masked_copy(
    any_model: PreTrainedModel,
) -> None:
    batch, before = tiny.make_batch(padding="right"), tiny.snapshot(any_model)
    where = place(any_model, batch)
    own = by_block(where.blocks, np.linspace(0.3, 0.6, len(where.blocks.prunable)))
    own[::3] += 0.05
    slopes = MaskedSlopes(where.blocks, where.masks(Wanda()), own, STEP)
    probe = GradientProbe(where.blocks, slopes)
    run(any_model, [batch], probe)

    sparsities = named(where.blocks, own)
    pruned = naive.masked(any_model, where.statistics, sparsities)
    total = naive.loss_sums(pruned, batch).sum()
    total.backward()
    tokens, expected = naive.predicted(batch), []
    for name, s in sparsities.items():
        weight = any_model.get_submodule(name).weight.detach()
        gradient = pruned.get_submodule(name).weight.grad
        ranks, columns = naive.order(weight, where.statistics[name]), weight.shape[1]
        low, high = int(columns * (s - STEP)), int(columns * (s + STEP))
        changed = (ranks >= low) & (ranks < high)
        effect = -float((gradient * weight)[changed].double().sum())
        expected.append(effect * columns / (high - low) / tokens)
    np.testing.assert_allclose(probe.result().mean(), expected, rtol=1e-3, atol=1e-5)
    assert probe.result().loss == pytest.approx(total.item() / tokens, rel=1e-5)
    tiny.assert_untouched(any_model, before)


@pytest.mark.parametrize("kind", list(PRUNERS))
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "falcon_h1"])
def test_slope_equals_autograd_through_a_pruned_copy(
    kind: str, architecture: str
) -> None:
    """Every Linear by llm-compressor's function, at s, s − δ and s + δ."""
    model, pruner = tiny.make_model(architecture), PRUNERS[kind]()
    batch, before = tiny.make_batch(6, 24), tiny.snapshot(model)
    where = place(model, batch)
    own = by_block(where.blocks, [0.4, 0.5, 0.6])
    slopes = PrunedModel(where.blocks, pruner, own, STEP)
    run(model, [batch], slopes)
    probe = GradientProbe(where.blocks, slopes.result())
    run(model, [batch], probe)

    prune, sparsities = as_upstream(pruner), named(where.blocks, own)
    pruned = pruned_copy(model, where.blocks, sparsities, batch, prune)
    naive.loss_sums(pruned, batch).sum().backward()
    expected: dict[str, float] = {}
    # what enters a Linear as its block is pruned: the block itself is dense still
    for block in where.blocks.blocks:
        names = [block.full_name(name) for name in block.linears]
        dense = copy.deepcopy(pruned)
        for name in names:
            dense.get_submodule(name).weight.data = before[f"{name}.weight"].clone()
        for name, inputs in inputs_of(dense, names, batch).items():
            weight, s = before[f"{name}.weight"], sparsities[name]
            less, more = (prune(weight, x, inputs) for x in band(s, STEP))
            share = ((more == 0).sum() - (less == 0).sum()).item() / weight.numel()
            gradient = pruned.get_submodule(name).weight.grad
            along = float((gradient * (more - less)).double().sum())
            expected[name] = along / share / naive.predicted(batch)
    wanted = [expected[name] for name in sparsities]
    np.testing.assert_allclose(probe.result().mean(), wanted, rtol=2e-2, atol=2e-4)
    assert np.abs(wanted).max() > 0.05
    tiny.assert_untouched(model, before)


def small(model: PreTrainedModel) -> PreTrainedModel:
    """With blocks that say little, so that the loss is nearly linear in them."""
    for linear in place(model, tiny.make_batch()).blocks.linears().values():
        linear.weight.data *= 0.5
    return model


def test_slope_is_that_of_the_loss(llama: PreTrainedModel) -> None:
    """Where few and small weights are masked, it is close to a finite difference."""
    batch, step = tiny.make_batch(samples=8, tokens=24), 0.125
    where = place(small(llama), batch)
    own, by = where.flat(0.25), Groups.at("block", where.blocks)
    slopes = MaskedSlopes(where.blocks, where.masks(Wanda()), own, step)
    probe = GradientProbe(where.blocks, slopes)
    run(llama, [batch], probe)
    losses = []
    for unit in np.eye(3):
        for sign in (1, -1):
            shifted = named(where.blocks, own + sign * step * by.spread(unit))
            with torch.no_grad():
                masked = naive.masked(llama, where.statistics, shifted)
                losses.append(naive.loss_sums(masked, batch).sum().item())
    difference = np.subtract(losses[::2], losses[1::2])
    difference /= 2 * step * naive.predicted(batch)
    found = by.total(probe.result().mean())
    np.testing.assert_allclose(found, difference, rtol=0.25, atol=2e-3)
    assert np.abs(found).max() > 0.01


@pytest.mark.parametrize(
    "pruner", [Wanda(), SparseGPT(block_size=16, dampening=0.02)], ids=str
)
@pytest.mark.parametrize("linear", ["v_proj", "o_proj", "gate_proj"])
def test_slope_of_one_linear_is_that_of_llm_compressors_pruning(
    llama: PreTrainedModel, pruner: Pruner, linear: str
) -> None:
    """A finite difference of the loss, through the function that will prune."""
    batch, step, sparsity = tiny.make_batch(samples=8, tokens=24), 0.125, 0.5
    where = place(small(llama), batch)
    part = "mlp" if linear == "gate_proj" else "self_attn"
    name = f"model.layers.1.{part}.{linear}"
    blocks = where.blocks.restrict([name])
    slopes = PrunedModel(blocks, pruner, np.array([sparsity]), step)
    run(llama, [batch], slopes)
    probe = GradientProbe(blocks, slopes.result())
    run(llama, [batch], probe)

    losses, zeros = [], []
    for wanted in band(sparsity, step):
        pruned = pruned_copy(
            llama, blocks, {name: wanted}, batch, as_upstream(pruner)
        ).requires_grad_(False)
        losses.append(naive.loss_sums(pruned, batch).sum().item())
        weight = pruned.get_submodule(name).weight
        zeros.append((weight == 0).float().mean().item())
    difference = (losses[1] - losses[0]) / (zeros[1] - zeros[0])
    expected = difference / naive.predicted(batch)
    (found,) = probe.result().mean()
    assert found == pytest.approx(expected, rel=0.1)
    assert abs(found) > 1e-3


@pytest.mark.parametrize("kind", ["masks", *PRUNERS])
def test_batch_size_changes_nothing(llama: PreTrainedModel, kind: str) -> None:
    batch, found = tiny.make_batch(padding="left"), []
    where = place(llama, batch)
    singles = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    for batches in ([batch], singles, singles[::-1]):
        probe = GradientProbe(where.blocks, slopes_of(kind, where, batch))
        run(llama, batches, probe)
        found.append(probe.result().mean())
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["masks", *PRUNERS])
def test_linears_without_tokens_have_no_slope(kind: str) -> None:
    model = tiny.make_model("qwen3_moe", num_experts=16)
    batch = tiny.make_batch(samples=1, tokens=3)
    where = place(model, batch)
    seen = {n: x for n, x in where.statistics.items() if x.any()}
    where = place(model, batch, seen)
    source = slopes_of(kind, where, batch)
    probe = GradientProbe(where.blocks, source)
    run(model, [batch], probe)
    slopes = dict(zip(where.blocks.linears(), probe.result().mean(), strict=True))
    pruned = {
        block.full_name(name)
        for index, block in enumerate(where.blocks.blocks)
        for name in source.weights(index)
    }
    moved = {name for name, slope in slopes.items() if slope != 0}
    assert moved <= pruned < slopes.keys()
    assert any(".experts." in name for name in moved)


def slopes_of(kind: str, where: Place, batch: Batch) -> MaskedSlopes | PrunedSlopes:
    if kind == "masks":
        masks = where.masks(Wanda())
        return MaskedSlopes(where.blocks, masks, where.flat(), STEP)
    pruned = PrunedModel(where.blocks, PRUNERS[kind](), where.flat(), STEP)
    run(where.model, [batch], pruned)
    return pruned.result()


def test_slopes_of_groups_are_per_share_of_all_weights(llama: PreTrainedModel) -> None:
    """The budget is one of weights: a small group that helps as much helps more."""
    where = place(llama, tiny.make_batch())
    groups, random = Groups.at("part", where.blocks), np.random.default_rng(0)
    each, tokens = random.normal(size=(5, 21)), np.array([9.0, 4, 7, 7, 2])
    found = LinearSlopes(each, tokens, [], 2.5).of_groups(groups)
    assert found.loss == 2.5
    for g in range(6):
        own = groups.of == g
        share = groups.sizes[own].sum() / groups.sizes.sum()
        sums = each[:, own].sum(axis=1)
        assert found.mean[g] == pytest.approx(sums.sum() / tokens.sum() / share)
        error = standard_error(sums, tokens) / share
        assert found.error[g] == pytest.approx(error)


@pytest.mark.parametrize("architecture", ["llama", "falcon_h1", "opt"])
def test_slopes_of_every_sample(architecture: str) -> None:
    """As if each were alone, so that their spread tells the error."""
    model, batch = tiny.make_model(architecture), tiny.make_batch(padding="right")
    where = place(model, batch)
    singles = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    whole, alone = [
        GradientProbe(where.blocks, slopes_of("masks", where, batch)) for _ in "ab"
    ]
    run(model, [batch], whole)
    run(model, singles, alone)
    found, expected = whole.result(), alone.result()
    np.testing.assert_allclose(found.slopes, expected.slopes, rtol=1e-3, atol=1e-4)
    assert found.tokens.tolist() == expected.tokens.tolist() == [11, 9, 7]
    assert found.mixed == []


def test_experts_that_happen_to_see_all_tokens() -> None:
    """In the order of the router's choice, by which nothing tells whose they are."""
    shape = {"num_local_experts": 2, "num_experts_per_tok": 2}
    model, batch = tiny.make_model("mixtral", **shape), tiny.make_batch()
    where = place(model, batch)
    probe = GradientProbe(where.blocks, slopes_of("masks", where, batch))
    run(model, [batch], probe)
    experts = [".experts." in name for name in where.blocks.linears()]
    assert sum(experts) and probe.result().mixed == list(np.flatnonzero(experts))


def test_experts_have_slopes_without_an_error() -> None:
    model, batch = tiny.make_model("qwen3_moe"), tiny.make_batch()
    where = place(model, batch)
    probe = GradientProbe(where.blocks, slopes_of("masks", where, batch))
    run(model, [batch], probe)
    found, names = probe.result(), list(where.blocks.linears())
    experts = [i for i, name in enumerate(names) if ".experts." in name]
    assert set(found.mixed) <= set(experts) and len(found.mixed) > len(experts) / 2
    groups = Groups.at("linear", where.blocks)
    slopes = found.of_groups(groups)
    of_experts = {int(g) for g in groups.of[experts]}
    assert set(np.flatnonzero(np.isnan(slopes.error))) == of_experts
    assert np.isfinite(slopes.mean).all()


@pytest.mark.parametrize("kind", ["masks", "sparsegpt"])
@pytest.mark.parametrize(
    "architecture", ["llama", "gemma3", "opt", "mixtral", "falcon_h1", "bloom"]
)
def test_graphs_that_are_kept_change_nothing(
    architecture: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But that a block does not run again: none, some and all of them kept."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 2**12)  # whatever the limit
    model, batch = tiny.make_model(architecture), tiny.make_batch(2, 24)
    where = place(model, batch)
    source = slopes_of(kind, where, batch)
    needs = GradientProbe(where.blocks, source).needs
    need = footprint(model, where.blocks.modules, [needs], GIB)
    least, found, ran = need.whole(2, 24, 2), [], []

    def measured(memory: int) -> int:
        probe = GradientProbe(where.blocks, source)
        with (
            tiny.counted(first_linears(where.blocks)) as passes,
            live_bytes(model, where.statistics, batch) as live,
        ):
            run(model, [batch], probe, memory=memory)
        found.append(probe.result())
        ran.append(sum(passes.values()))
        assert live.peak <= memory
        return probe._graphs.bytes

    assert measured(least) == 0
    all_kept = measured(GIB)
    measured(least + all_kept * 2 // 3)
    blocks = len(where.blocks)
    assert (ran[0], ran[1]) == (2 * blocks, blocks) and blocks < ran[2] < 2 * blocks
    for one in found[1:]:
        np.testing.assert_array_equal(one.slopes, found[0].slopes)
        assert one.loss == found[0].loss


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "falcon_h1"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_of_graphs_nothing_is_left(
    architecture: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 2**12)
    model, batch = tiny.make_model(architecture), tiny.make_batch(2, 24)
    where = place(model, batch)
    probe = GradientProbe(where.blocks, slopes_of("masks", where, batch))
    need = footprint(model, where.blocks.modules, [probe.needs], GIB)
    run(model, [batch], probe, memory=GIB)
    memory = need.whole(2, 24, 2) + int(share * probe._graphs.bytes)
    with live_bytes(model, where.statistics, batch) as live:
        left = []
        for _ in range(3):
            probe = GradientProbe(where.blocks, slopes_of("masks", where, batch))
            run(model, [batch] * 3, probe, memory=memory)
            assert bool(probe._graphs.bytes) == bool(share)
            del probe
            gc.collect()
            left.append(live.now)
    assert left[0] == left[1] == left[2]


class Full(torch.nn.Module):
    """An activation for which memory runs out, once, where it is differentiated."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.passes = inner, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.passes:
            self.passes = False
            raise torch.OutOfMemoryError("it is full")
        return self.inner(x)


@pytest.mark.parametrize("where_full", ["first block", "last block", "backward"])
def test_graphs_go_where_memory_runs_out(
    where_full: str, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is enough: the batch need not be halved."""
    model, batch = tiny.make_model("llama"), tiny.make_batch(2, 24)
    where, backward = place(model, batch), GradientProbe._backward
    probe = GradientProbe(where.blocks, slopes_of("masks", where, batch))
    run(model, [batch], probe)
    expected = probe.result().slopes
    errors = [torch.OutOfMemoryError("it is full")]

    def full_once(*args: Any) -> torch.Tensor:
        if errors:
            raise errors.pop()
        return backward(*args)

    if where_full == "backward":
        monkeypatch.setattr(GradientProbe, "_backward", full_once)
    else:
        layer = model.model.layers[0 if where_full == "first block" else -1]
        layer.mlp.act_fn = Full(layer.mlp.act_fn)
    with live_bytes(model, where.statistics, batch) as live:
        left = []
        for full in (True, False):
            probe = GradientProbe(where.blocks, slopes_of("masks", where, batch))
            run(model, [batch], probe)
            np.testing.assert_array_equal(probe.result().slopes, expected)
            assert (probe._graphs.bytes == 0) == full
            del probe
            gc.collect()
            left.append(live.now)
        assert left[0] == left[1]
    assert not warnings


def test_what_fills_the_device_before_a_batch_ends(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of the batch before are no longer there to be given back."""
    batch, calls = tiny.make_batch(2, 24), itertools.count()

    def device(model: torch.nn.Module) -> torch.device:
        if next(calls):
            raise torch.OutOfMemoryError("it is full")
        return torch.device("cpu")

    monkeypatch.setattr(run_module, "get_execution_device", device)
    where = place(llama, batch)
    probe = GradientProbe(where.blocks, slopes_of("masks", where, batch))
    with pytest.raises(torch.OutOfMemoryError, match="a single sample"):
        run(llama, [batch, batch], probe)
    assert next(calls) < 10


def test_once_out_of_memory_no_later_round_keeps_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.make_model("llama")
    layer = model.model.layers[0]
    layer.mlp.act_fn = full = Full(layer.mlp.act_fn)
    kept, keep = [], KeptGraphs.keep
    monkeypatch.setattr(KeptGraphs, "keep", lambda self: kept.append(1) or keep(self))
    monkeypatch.setattr("absorb_plugin.method.check_forward", lambda *_, **__: None)
    batches = [tiny.make_batch(1, 24, seed=seed) for seed in range(12)]
    runs.allocate(model, batches, strength="auto", signal="gradient", rounds=3)
    assert not full.passes and not kept


def test_what_is_modified_in_place_is_told() -> None:
    graphs, x = KeptGraphs(GIB), torch.ones(3, requires_grad=True)
    with graphs.recording():
        squares = x * 2
        total = (squares**2).sum()
    with torch.no_grad():
        squares += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_of_blocks_that_are_offloaded_no_graph_is_kept() -> None:
    with fake_accelerator():
        model = set_onload_device(tiny.make_model("llama"), torch.device("fake:0"))
        batch = {name: x.to("fake:0") for name, x in tiny.make_batch(2, 24).items()}
        where = place(model, batch)
        for block in where.blocks.modules:
            assert not KeptGraphs(GIB).may_keep(block)
        there = tiny.make_model("llama").to("fake:0")
        for block in find_blocks(there).modules:
            assert KeptGraphs(GIB).may_keep(block)
            assert not KeptGraphs(0).may_keep(block)


@pytest.mark.parametrize(
    ("samples", "tokens", "share"),
    [(8, 128, 0.4), (40, 256, 0.8), (4, 4, None)],
)
def test_by_few_tokens_less_of_the_way_is_gone(
    samples: int, tokens: int, share: float | None
) -> None:
    batches = [tiny.make_batch(1, tokens, seed=seed) for seed in range(samples)]
    effort = AllocationSettings().measuring()
    split = SampleSplit(batches, effort, judged=True, by_loss=True)
    context = cast(Context, SimpleNamespace(samples=split))
    (stage,) = Gradient().stages(context, effort.rounds)
    assert 0 < stage.share <= 0.8
    assert share is None or stage.share == pytest.approx(share)
