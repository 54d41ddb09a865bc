"""Losses after pruning, against llm-compressor's own function and its own order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import naive, runs, tiny
from helpers.probes import PRUNERS, by_block, place, run
from helpers.upstream import as_upstream, pruned_copy
from llmcompressor.core import reset_session
from transformers import PreTrainedModel

from absorb_plugin.blocks import BlockMap, find_blocks
from absorb_plugin.calibration import pad_to_batch, samples_of, split_samples
from absorb_plugin.forward.parts import Parts
from absorb_plugin.groups import named
from absorb_plugin.judges import PrunedLoss
from absorb_plugin.pruners import Pruner, SparseGPT, Wanda
from absorb_plugin.pruners.traced import keep_causal_masks

DENSE = [
    *("llama", "mistral", "qwen3", "gemma3", "opt", "gpt_neox", "phi3", "falcon_h1"),
    *("bloom", "mpt"),
]
MIXTURES = ["qwen3_moe", "mixtral"]
SETTINGS = [Wanda(), SparseGPT(block_size=16, dampening=0.02)]
by_pruner = pytest.mark.parametrize("pruner", SETTINGS, ids=lambda one: one.name)


def batches(samples: int) -> tuple[dict, dict, dict]:
    """Calibration samples, ones to judge by, and both in a batch."""
    both = tiny.make_batch(samples, 14, padding="right")
    first, *_ = split_samples([both], samples - 2)
    judged = {name: rows[samples - 2 :] for name, rows in both.items()}
    return first, judged, both


def losses_of(
    model: PreTrainedModel,
    pruner: Pruner,
    candidates: list[np.ndarray],
    batch: dict,
    calibrating: int,
) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for together in (False, True):
        judge = PrunedLoss(
            find_blocks(model), pruner, candidates, calibrating, together
        )
        run(model, [batch], judge)
        found.append(judge.result())
    if pruner.hessians:
        assert_alike(found[1][0], found[0][0])
    else:
        np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-3)
    return found[0]


def assert_alike(losses: np.ndarray, expected: np.ndarray) -> None:
    """
    Factors that are made in another order differ in the last digits, so of two weights
    with equal scores the other may go. On which CPU that happens differs.
    """
    apart = np.abs(losses / np.array(expected) - 1)
    assert np.median(apart) < 1e-5 and apart.max() < 2e-2


def assert_close(losses: np.ndarray, expected: np.ndarray) -> None:
    assert_alike(losses, expected)
    assert np.ptp(losses, axis=0).max() > 5e-3 * losses.max()


@by_pruner
@pytest.mark.parametrize("architecture", DENSE)
def test_losses_are_those_of_a_pruned_copy(architecture: str, pruner: Pruner) -> None:
    model = tiny.make_model(architecture)
    blocks = find_blocks(model)
    calibration, judged, both = batches(5)
    own = by_block(blocks, np.linspace(0.3, 0.6, len(blocks.prunable)))
    each = np.random.default_rng(0).uniform(0.1, 0.9, len(own))  # every Linear its own
    candidates = [own, each, np.zeros_like(own)]
    before = tiny.snapshot(model)
    losses, tokens = losses_of(model, pruner, candidates, both, 3)
    prune = as_upstream(pruner)
    copies = [
        pruned_copy(model, blocks, named(blocks, one), calibration, prune)
        for one in candidates
    ]
    assert_close(losses, [naive.loss_sums(one, judged).tolist() for one in copies])
    assert tokens.tolist() == [(judged["attention_mask"][i].sum() - 1) for i in (0, 1)]
    tiny.assert_untouched(model, before)


# --- against a whole oneshot of llm-compressor ------------------------------------


def oneshot(
    model: PreTrainedModel,
    blocks: BlockMap,
    kind: str,
    allocation: np.ndarray,
    directory: Path,
    **fields: Any,
) -> PreTrainedModel:
    """A sequential run of the pruner alone, with the allocation as its list."""
    modifier = runs.pruner(
        kind, sparsity=allocation.tolist(), targets=list(blocks.linears()), **fields
    )
    reset_session()
    return runs.run(model, [modifier], directory, pipeline="sequential")


@pytest.mark.contract
@pytest.mark.parametrize(
    "kind, fields",
    [
        ("wanda", {}),
        ("sparsegpt", {}),
        ("sparsegpt", {"block_size": 16, "dampening_frac": 0.03}),
        ("sparsegpt", {"preserve_sparsity_mask": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "opt", "mistral"])
def test_losses_are_those_of_a_oneshot_on_the_same_samples(
    kind: str, fields: dict, architecture: str, tmp_path: Path
) -> None:
    model = tiny.make_model(architecture)
    blocks, keeps = find_blocks(model), "preserve_sparsity_mask" in fields
    for linear in blocks.linears().values() if keeps else ():
        weight = linear.weight.data
        weight[torch.rand(weight.shape) < 0.25] = 0
    pruner = PRUNERS[kind].of(runs.pruner(kind, **fields))
    assert not keeps or pruner == SparseGPT(preserve=True)
    calibration, judged = tiny.make_dataset(6), tiny.make_dataset(4, seed=1)
    batch = pad_to_batch([*samples_of(calibration), *samples_of(judged)])
    own = by_block(blocks, [0.4, 0.5, 0.6])
    each = np.random.default_rng(0).uniform(0.35, 0.9, len(own))
    losses, _ = losses_of(model, pruner, [own, each], batch, 6)
    expected = []
    for number, one in enumerate((own, each)):
        copy = tiny.make_model(architecture)
        copy.load_state_dict(model.state_dict())
        undo = keep_causal_masks(copy, find_blocks(copy).modules)  # as our modifier
        pruned = oneshot(copy, blocks, kind, one, tmp_path / str(number), **fields)
        undo()
        rows = pad_to_batch(samples_of(judged))
        with torch.no_grad():
            expected.append(naive.loss_sums(pruned, rows).tolist())
    assert_close(losses, np.array(expected))


# ----------------------------------------------------------------------------------


@by_pruner
@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_without_tokens_stay_dense(architecture: str, pruner: Pruner) -> None:
    model = tiny.make_model(architecture)
    *_, both = batches(3)
    half, before = place(model, both).flat(), tiny.snapshot(model)
    losses, _ = losses_of(model, pruner, [half, half], both, 1)
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    tiny.assert_untouched(model, before)


@by_pruner
@pytest.mark.parametrize("architecture", ["llama", *MIXTURES])
def test_what_is_judged_by_is_not_calibrated_by(
    architecture: str, pruner: Pruner
) -> None:
    model = tiny.make_model(architecture)
    *_, both = batches(4)
    half = place(model, both).flat()

    def losses(batch: dict) -> np.ndarray:  # of two candidates
        return losses_of(model, pruner, [half, half / 2], batch, 2)[0].T

    other = {name: rows.clone() for name, rows in both.items()}
    other["input_ids"][3] = other["input_ids"][3].flip(0)
    one, two = losses(both), losses(other)
    assert one[0] == pytest.approx(two[0], rel=1e-5) and (one[1] != two[1]).all()
    other["input_ids"][0] = other["input_ids"][0].flip(0)
    assert losses(other)[0] != pytest.approx(one[0], rel=1e-5)


@pytest.mark.parametrize("architecture", [*DENSE, *MIXTURES])
def test_losses_do_not_depend_on_how_many_samples_a_block_runs_at_a_time(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make_model(architecture)
    batch = tiny.make_batch(5, 14)
    half = place(model, batch).flat()

    def losses(size: int) -> np.ndarray:
        monkeypatch.setattr("absorb_plugin.forward.run.Parts", lambda: Parts(size))
        return losses_of(model, Wanda(), [half, half / 2], batch, 3)[0]

    np.testing.assert_allclose(losses(2), losses(0), rtol=1e-4)
    np.testing.assert_allclose(losses(1), losses(0), rtol=1e-4)


def test_samples_of_any_length_make_one_batch(llama: PreTrainedModel) -> None:
    samples = [tiny.make_batch(1, length, seed=length) for length in (5, 9, 7)]
    del samples[1]["attention_mask"]
    batch = pad_to_batch(samples)
    assert batch["input_ids"].shape == (3, 9)
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 9, 7]
    alike = pad_to_batch([{"input_ids": samples[1]["input_ids"]}] * 2)
    assert alike.keys() == {"input_ids"} and len(alike["input_ids"]) == 2
    with torch.no_grad():
        logits = llama(**batch).logits
        for row, sample in zip(logits, samples, strict=True):
            length = sample["input_ids"].shape[1]
            torch.testing.assert_close(row[:length], llama(**sample).logits[0])
