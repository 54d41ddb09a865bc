"""SparseGPT rehearsed: against llm-compressor's own function and its own order."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from absorb_plugin.compensation import Compensation
from absorb_plugin.rehearsal import Rehearsal
from absorb_plugin.strength import Search, search_strength
from helpers import naive, runs, tiny
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
from test_sweep import ride
from transformers import PreTrainedModel

from absorb_plugin.blocks import BlockMap, find_blocks
from absorb_plugin.calibration import padded, split_samples, token_mask

DENSE = [
    *("llama", "mistral", "qwen3", "gemma3", "opt", "gpt_neox", "phi3", "falcon_h1"),
    "bloom",
]
MIXTURES = ["qwen3_moe", "mixtral"]
SETTINGS = Compensation(block_size=16, dampening=0.02)


def upstream(
    weight: torch.Tensor, sparsity: float, inputs: torch.Tensor, settings: Compensation
) -> torch.Tensor:
    """One Linear, pruned by llm-compressor's function."""
    linear = torch.nn.Linear(weight.shape[1], len(weight), bias=False)
    linear.weight.data = weight.detach().clone()
    hessian = {linear: 2 / 3 * inputs.float().t() @ inputs.float()}  # any scale
    return sparsify_weight(
        linear, hessian, sparsity, 0, 0, settings.block_size, settings.dampening, False
    )[1]


@pytest.mark.contract
@pytest.mark.parametrize("features", [8, 128, 200])
@pytest.mark.parametrize("sparsities", [(0.7, 0.7), (0.0, 0.5), (0.95, 0.3)])
def test_weights_are_those_of_llm_compressor(
    features: int, sparsities: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    mixing = torch.randn(features, features) / features**0.5
    inputs = torch.randn(4 * features, features) @ mixing
    inputs[:, 3] = 0  # a feature that is never there
    weights = [torch.randn(24, features), torch.randn(40, features)]
    before = [weight.clone() for weight in weights]
    settings = Compensation()
    found = settings.pruned(weights, sparsities, inputs)
    for weight, sparsity, pruned in zip(weights, sparsities, found, strict=True):
        expected = upstream(weight, sparsity, inputs, settings)
        assert torch.equal(pruned == 0, expected == 0)
        torch.testing.assert_close(pruned, expected, rtol=1e-3, atol=1e-3)
    assert all(map(torch.equal, weights, before))


@pytest.mark.contract
def test_too_few_tokens_and_no_dampening_are_survived() -> None:
    """The Hessian is singular: both fall back to magnitudes."""
    inputs, weight = torch.ones(2, 6), torch.randn(4, 6)
    settings = Compensation(dampening=0.0)
    (found,) = settings.pruned([weight], [0.5], inputs)
    torch.testing.assert_close(found, upstream(weight, 0.5, inputs, settings))
    assert int((found == 0).sum()) == 13


def test_dtypes_are_kept() -> None:
    weight = torch.randn(6, 8).half()
    (found,) = Compensation().pruned([weight], [0.5], torch.randn(32, 8).half())
    assert found.dtype == torch.float16 and found.isfinite().all()


@torch.no_grad()
def rehearsed(
    model: PreTrainedModel, blocks: BlockMap, allocation: np.ndarray, batch: dict
) -> PreTrainedModel:
    """A copy pruned block by block, its Linears watched in whole forwards."""
    pruned = copy.deepcopy(model)
    kept = token_mask(batch).flatten()
    for index, sparsity in zip(blocks.prunable, allocation, strict=True):
        block = blocks.blocks[index]
        inputs: dict[str, torch.Tensor] = {}

        def keep(name: str, inputs: dict = inputs) -> object:
            def hook(module: torch.nn.Module, args: tuple, output: object) -> None:
                inputs[name] = args[0].flatten(0, -2)[kept]

            return hook

        linears = {n: pruned.get_submodule(block.full_name(n)) for n in block.linears}
        handles = [x.register_forward_hook(keep(n)) for n, x in linears.items()]
        pruned(**batch, use_cache=False)
        for handle in handles:
            handle.remove()
        for name, x in inputs.items():
            weight = linears[name].weight
            weight.copy_(upstream(weight, float(sparsity), x, SETTINGS))
    return pruned


def batches(samples: int) -> tuple[dict, dict, dict]:
    """Calibration samples, ones to judge by, and both in a batch."""
    both = tiny.make_batch(samples, 14, padding="right")
    first, *_ = split_samples([both], samples - 2)
    judged = {name: rows[samples - 2 :] for name, rows in both.items()}
    return first, judged, both


@pytest.mark.parametrize("architecture", DENSE)
def test_losses_are_those_of_a_pruned_copy(architecture: str) -> None:
    model = tiny.make_model(architecture)
    blocks = find_blocks(model)
    calibration, judged, both = batches(5)
    sums = naive.square_sums(model, blocks, calibration)
    own = np.linspace(0.3, 0.6, len(blocks.prunable))
    candidates = [own, own[::-1], np.zeros_like(own)]
    before = tiny.snapshot(model)
    probe = Rehearsal(blocks, sums, candidates, SETTINGS, 3)
    ride(model, [both], probe)
    losses, tokens = probe.losses()
    expected = [
        naive.loss_sums(rehearsed(model, blocks, one, calibration), judged).tolist()
        for one in candidates
    ]
    # upstream's factor of the inverse is another in the last digits, so of two weights
    # with equal scores the other may go
    apart = np.abs(losses / np.array(expected) - 1)
    assert np.median(apart) < 1e-5 and apart.max() < 2e-2
    assert np.ptp(losses, axis=0).max() > 5e-3 * losses.max()
    assert tokens.tolist() == [(judged["attention_mask"][i].sum() - 1) for i in (0, 1)]
    tiny.assert_untouched(model, before)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_without_tokens_stay_dense(architecture: str) -> None:
    model = tiny.make_model(architecture)
    blocks = find_blocks(model)
    *_, both = batches(3)
    sums = naive.square_sums(model, blocks, both)
    before = tiny.snapshot(model)
    half = np.full(len(blocks.prunable), 0.5)
    probe = Rehearsal(blocks, sums, [half, half], SETTINGS, 1)
    ride(model, [both], probe)
    losses, _ = probe.losses()
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    tiny.assert_untouched(model, before)


def test_what_is_judged_by_is_not_calibrated_by(llama: PreTrainedModel) -> None:
    blocks = find_blocks(llama)
    *_, both = batches(4)
    sums = naive.square_sums(llama, blocks, both)
    half = np.full(len(blocks.prunable), 0.5)

    def losses(batch: dict) -> np.ndarray:
        probe = Rehearsal(blocks, sums, [half], SETTINGS, 2)
        ride(llama, [batch], probe)
        return probe.losses()[0][0]

    other = {name: rows.clone() for name, rows in both.items()}
    other["input_ids"][3] = other["input_ids"][3].flip(0)
    one, two = losses(both), losses(other)
    assert one[0] == pytest.approx(two[0], rel=1e-5) and one[1] != two[1]
    other["input_ids"][0] = other["input_ids"][0].flip(0)
    assert losses(other)[0] != pytest.approx(one[0], rel=1e-5)


def test_samples_of_any_length_make_one_batch(llama: PreTrainedModel) -> None:
    samples = [tiny.make_batch(1, length, seed=length) for length in (5, 9, 7)]
    del samples[1]["attention_mask"]
    batch = padded(samples)
    assert batch["input_ids"].shape == (3, 9)
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 9, 7]
    alike = padded([{"input_ids": samples[1]["input_ids"]}] * 2)
    assert alike.keys() == {"input_ids"} and len(alike["input_ids"]) == 2
    with torch.no_grad():
        logits = llama(**batch).logits
        for row, sample in zip(logits, samples, strict=True):
            length = sample["input_ids"].shape[1]
            torch.testing.assert_close(row[:length], llama(**sample).logits[0])


@pytest.mark.parametrize(
    "kind, fields, asked",
    [
        ("sparsegpt", {}, True),
        ("sparsegpt", {"preserve_sparsity_mask": True}, False),
        ("wanda", {}, False),
    ],
)
def test_the_pruner_behind_decides(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    fields: dict,
    asked: bool,
) -> None:
    """Where it is SparseGPT, with its own settings, and only there."""
    settings: list[Compensation] = []
    init = Rehearsal.__init__

    def made(self: Rehearsal, *args: Any) -> None:
        settings.append(args[3])
        init(self, *args)

    def search(base: np.ndarray, *args: Any) -> Search:
        *_, rehearse = args
        rehearsals = [] if rehearse is None else [rehearse([base])]
        assert all(np.isfinite(sums).all() for sums, _ in rehearsals)
        return search_strength(base, *args)

    monkeypatch.setattr(Rehearsal, "__init__", made)
    monkeypatch.setattr("absorb_plugin.modifier.search_strength", search)
    if kind == "sparsegpt":
        fields = {"block_size": 16, "dampening_frac": 0.03} | fields
    ours = runs.absorption(strength="auto", rounds=1)
    runs.run(tiny.make_model("llama"), [ours, runs.pruner(kind, **fields)], tmp_path)
    assert set(settings) == ({Compensation(16, 0.03)} if asked else set())


def test_it_can_be_left_out(llama: PreTrainedModel) -> None:
    blocks, batch = find_blocks(llama), tiny.make_batch(6)

    def searched(**fields: object) -> object:
        modifier = runs.absorption(**{"strength": "auto"} | fields)
        found = modifier.allocate(llama, blocks, [batch], 0.5, Compensation())
        return found.search and found.search.rehearsed

    assert searched(rehearsal_samples=0) is None
    assert searched(strength=0.1) is None
    assert searched(strength=0) is None
