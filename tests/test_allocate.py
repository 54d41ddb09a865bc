"""The method as a whole: what it finds, what it asks, and what is left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import naive, runs, tiny
from helpers.probes import PRUNERS
from transformers import PreTrainedModel

from absorb_plugin import method
from absorb_plugin.allocators.base_allocation import Base
from absorb_plugin.blocks import find_blocks
from absorb_plugin.groups import LEVELS, named
from absorb_plugin.judges import PrunedLoss
from absorb_plugin.pruners import Pruner, SparseGPT, Wanda
from absorb_plugin.search.budget import Budget
from absorb_plugin.search.confirm import Confirmed
from absorb_plugin.search.line_search import SearchResult


@pytest.mark.parametrize("kind", list(PRUNERS))
@pytest.mark.parametrize("level", LEVELS)
def test_planted_block_is_protected(kind: str, level: str) -> None:
    """
    All the knowledge of the model sits in block 1: it alone turns a token into the
    next. Pruning it costs, pruning the idle blocks 0 and 2 costs nothing.
    """
    model = tiny.make_model("llama", initializer_range=0.02)
    train_block(model, 1)
    batches, blocks = [chain_batch(12)], find_blocks(model)
    found = runs.allocate(
        model, batches, 0.6, kind, allocator="uniform", strength="auto", level=level
    )
    assert found.search is not None and found.search.sparsity is not None
    assert found.block_means(found.direction)[1] < 0
    assert found.block_means(found.sparsity)[1] < 0.6 - 0.04
    assert found.search.loss < found.search.base_loss - 0.01
    assert found.confirmed is not None and found.confirmed.chosen != "base"
    sums, losses = naive.square_sums(model, blocks, chain_batch(12)), []
    for sparsities in (found.base.sparsity, found.sparsity):
        pruned = naive.masked(model, sums, named(blocks, sparsities))
        with torch.no_grad():
            losses.append(naive.loss_sums(pruned, chain_batch(8, seed=9)).sum().item())
    assert losses[1] < losses[0]  # on fresh text too


def chain_batch(samples: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Sequences in which each token is followed by a fixed other one."""
    generator = torch.Generator().manual_seed(0)
    follower = torch.randperm(tiny.VOCABULARY, generator=generator)
    generator.manual_seed(seed)
    ids = [torch.randint(tiny.VOCABULARY, (samples,), generator=generator)]
    for _ in range(15):
        ids.append(follower[ids[-1]])
    stacked = torch.stack(ids, dim=1)
    return {"input_ids": stacked, "attention_mask": torch.ones_like(stacked)}


def train_block(model: PreTrainedModel, index: int) -> None:
    torch.manual_seed(0)
    block = find_blocks(model).modules[index]
    embeddings = model.get_input_embeddings().weight
    torch.nn.init.normal_(embeddings)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = [*block.mlp.parameters(), model.lm_head.weight]
    for parameter in trained:
        parameter.requires_grad_(True)
    torch.nn.init.normal_(block.mlp.up_proj.weight, std=0.2)
    torch.nn.init.normal_(block.mlp.gate_proj.weight, std=0.2)
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for number in range(80):
        optimizer.zero_grad()
        naive.loss_sums(model, chain_batch(16, seed=number)).sum().backward()
        optimizer.step()
    model.requires_grad_(False)


@pytest.mark.parametrize(
    "kind, fields, expected",
    [
        ("sparsegpt", {"block_size": 16, "dampening_frac": 0.03}, SparseGPT(16, 0.03)),
        ("wanda", {}, Wanda()),
    ],
)
def test_the_pruner_that_follows_judges_with_its_own_settings(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    fields: dict,
    expected: Pruner,
) -> None:
    seen: list[Pruner] = []
    init = PrunedLoss.__init__

    def made(
        self: PrunedLoss, blocks: Any, pruner: Pruner, *args: Any, **fields: Any
    ) -> None:
        seen.append(pruner)
        init(self, blocks, pruner, *args, **fields)

    def confirm(
        found: np.ndarray, base: np.ndarray, budget: Any, judge: Any, *settled: bool
    ) -> Any:
        sums, _ = judge([base, found])
        assert np.isfinite(sums).all() and len(sums) == 2
        return confirmed(found, base, budget, judge, *settled)

    confirmed = method.confirm
    monkeypatch.setattr(PrunedLoss, "__init__", made)
    monkeypatch.setattr(method, "confirm", confirm)
    # what is found differs from the base, whatever the tiny model says
    monkeypatch.setattr("absorb_plugin.search.line_search.gain", lambda *a: (1.0, 0.0))
    ours = runs.absorption(strength="auto", rounds=1)
    runs.run(tiny.make_model("llama"), [ours, runs.pruner(kind, **fields)], tmp_path)
    assert seen and set(seen) == {expected}


def test_the_confirmation_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("absorb_plugin.search.line_search.gain", lambda *a: (1.0, 0.0))
    model = tiny.make_model("llama")
    for fields in ({"confirm_samples": 0, "strength": "auto"}, {"strength": 0.1}):
        assert runs.allocate(model, **fields).confirmed is None
    found = runs.allocate(model, strength="auto")
    assert found.confirmed is not None
    np.testing.assert_array_equal(found.sparsity, found.confirmed.sparsity)
    kept = runs.allocate(model, strength=0)
    np.testing.assert_array_equal(kept.sparsity, kept.base.sparsity)
    assert kept.direction is None and kept.search is None


@pytest.mark.parametrize(
    "blocks, level, kind, signal",
    [
        (2, "block", "wanda", "response"),
        (7, "block", "wanda", "gradient"),
        (2, "linear", "wanda", "gradient"),
        (2, "linear", "sparsegpt", "pruner"),
    ],
)
def test_signal_auto(blocks: int, level: str, kind: str, signal: str) -> None:
    """The cheaper one, and for a pruner that does more than mask its own."""
    model = tiny.make_model("llama", num_hidden_layers=blocks)
    found = runs.allocate(model, kind=kind, signal="auto", level=level)
    assert found.signal == signal


@pytest.mark.parametrize("better", [True, False])
def test_where_the_pruner_prefers_another_start_the_search_begins_there(
    better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks choose the start, and need not agree with what the pruner makes of it."""
    starts: list[str | None] = []
    original = method.Method.search

    def search(
        self: method.Method, base: Base, budget: Budget, start: str | None = None
    ) -> SearchResult:
        starts.append(start)
        found = original(self, base, budget, start)
        assert start in (None, found.start)
        return found

    def confirm(found: np.ndarray, *_: object) -> Confirmed:
        first = len(starts) == 1
        loss = 2.0 if first == better else 1.0
        preferred = "uniform" if first else ""
        return Confirmed(found, "searched", {"searched": loss}, 0.0, 0.0, preferred)

    monkeypatch.setattr(method.Method, "search", search)
    monkeypatch.setattr("absorb_plugin.method.confirm", confirm)
    # masks prefer the base
    monkeypatch.setattr(
        "absorb_plugin.search.line_search._means", lambda sums, tokens: [1.0, 2.0]
    )
    found = runs.allocate(
        tiny.make_model("llama"),
        [tiny.make_batch(8)],
        kind="sparsegpt",
        allocator="atp",
        signal="pruner",
        strength="auto",
        rounds=1,
    )
    assert starts == [None, "uniform"]
    assert found.search is not None and found.confirmed is not None
    assert found.search.start == ("uniform" if better else "base")
    assert found.confirmed.loss == 1.0 and found.confirmed.anew
    np.testing.assert_array_equal(found.sparsity, found.search.sparsity)


@pytest.mark.parametrize("allocator", ["atp", "uniform"])
def test_a_base_that_nothing_beat_is_compared_with_uniform(
    allocator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the pruner's arithmetic, though masks prefer it; itself with nothing."""

    def result(self: PrunedLoss) -> tuple[np.ndarray, np.ndarray]:
        asked.append(len(self._candidates))
        losses = np.array([20.0, 10.0, 15.0])[: asked[-1], None] * np.ones(2)
        return losses, np.full(2, 10.0)

    asked: list[int] = []
    monkeypatch.setattr(PrunedLoss, "result", result)
    line_search = "absorb_plugin.search.line_search"
    means = [1.0, 2.0, 3.0]  # by masks
    monkeypatch.setattr(f"{line_search}._means", lambda sums, _: means[: len(sums)])
    monkeypatch.setattr(f"{line_search}.beyond", lambda *_: False)
    found = runs.allocate(
        tiny.make_model("llama"),
        [tiny.make_batch(8)],
        allocator=allocator,
        strength="auto",
        rounds=1,
    )
    if allocator == "uniform":
        assert found.confirmed is None and not asked
        return
    assert found.confirmed is not None and asked[0] == 2
    assert found.confirmed.losses["base"] == 2.0
    assert found.confirmed.losses["uniform"] == found.confirmed.loss == 1.0
    assert np.ptp(found.sparsity) < 1e-6 < np.ptp(found.base.sparsity)


@pytest.mark.parametrize("own", [0.0, 0.05])
def test_as_many_weights_go_as_the_budget_says(
    own: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    Though Wanda takes int(columns * s) of every row, half a weight too few.

    :param own: share of zeros that the model has before
    """
    monkeypatch.setattr("absorb_plugin.search.line_search.gain", lambda *a: (1.0, 0.0))
    model = tiny.make_model("llama")
    weights = [linear.weight for linear in find_blocks(model).linears().values()]
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.data[torch.rand(weight.shape, generator=generator) < own] = 0
    ours = runs.absorption(strength="auto", confirm_samples=0)
    runs.run(model, [ours, runs.pruner(sparsity=0.5)], tmp_path)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    share = zeros / sum(weight.numel() for weight in weights)
    # the rows of one Linear are as many as 48 * 32 of 21,504 weights
    assert 0.5 - 2e-3 < share <= 0.5
