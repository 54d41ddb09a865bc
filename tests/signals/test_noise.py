"""
The noise probe: drift and ratio against whole forwards, sinks, sameness of noise, the
rounding floor.
"""

import copy

import numpy as np
import pytest
import torch
from helpers import naive, tiny
from helpers.probes import run
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.search.correction import direction_from_ratio
from absorb_plugin.signals.noise import (
    FLOOR_MARGIN,
    KNOWN,
    NoiseProbe,
    NoiseProfile,
    measure_until,
    unit_noise,
)

SEED, ETA = 7, 1e-2


def measured(
    model: PreTrainedModel,
    *batches: dict,
    sink_tokens: str = "perturb",
    dtype: str = "model",
) -> NoiseProfile:
    count = len(find_blocks(model))
    probe = NoiseProbe(range(count), count, ETA, SEED, sink_tokens, dtype)
    run(model, list(batches), probe)
    return probe.result()


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_profile_equals_whole_forwards(
    any_model: PreTrainedModel, padding: str | None
) -> None:
    batch = tiny.make_batch(padding=padding)
    blocks = find_blocks(any_model).modules
    drift, ratio, cosine = naive.noise_profile(any_model, blocks, batch, ETA, SEED)
    profile = measured(any_model, batch)
    np.testing.assert_allclose(profile.drift, drift, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(profile.ratio, ratio, rtol=1e-5)
    np.testing.assert_allclose(profile.realignment, cosine, rtol=1e-5)
    assert profile.samples == 3
    assert profile.tokens == batch["attention_mask"].sum()
    assert profile.ratio[-1] == 1.0
    assert np.isnan(profile.drift[np.tril_indices(3, -1)]).all()


def test_only_some_blocks_are_injected(llama: PreTrainedModel) -> None:
    batch = tiny.make_batch()
    probe = NoiseProbe([0, 2], 3, ETA, SEED, "perturb")
    run(llama, [batch], probe)
    whole = measured(llama, batch)
    np.testing.assert_allclose(probe.result().ratio, whole.ratio[[0, 2]], rtol=1e-6)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_batch_size_and_order_change_nothing(
    llama: PreTrainedModel, padding: str | None
) -> None:
    batch = tiny.make_batch(padding=padding)
    singles = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    whole = measured(llama, batch)
    for profile in (measured(llama, *singles), measured(llama, *reversed(singles))):
        np.testing.assert_allclose(profile.drift, whole.drift, rtol=1e-5)
        np.testing.assert_allclose(profile.ratio, whole.ratio, rtol=1e-5)
        np.testing.assert_allclose(profile.ratio_error, whole.ratio_error, rtol=1e-4)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing(llama: PreTrainedModel, padding: str) -> None:
    batch = tiny.make_batch(padding=padding)
    kept = batch["attention_mask"].bool()
    bare = [{k: v[i][kept[i]].unsqueeze(0) for k, v in batch.items()} for i in range(3)]
    padded, unpadded = measured(llama, batch), measured(llama, *bare)
    np.testing.assert_allclose(padded.drift, unpadded.drift, rtol=1e-4)
    np.testing.assert_allclose(padded.ratio, unpadded.ratio, rtol=1e-4)
    assert padded.tokens == unpadded.tokens


@pytest.mark.parametrize("padding", ["left", "right"])
def test_noise_depends_on_seed_and_own_tokens_alone(padding: str) -> None:
    batch = tiny.make_batch(padding=padding)
    noise = unit_noise(batch, 32, SEED)
    kept = batch["attention_mask"].bool()
    for sample in range(3):
        bare = {"input_ids": batch["input_ids"][sample][kept[sample]].unsqueeze(0)}
        assert torch.equal(noise[sample, kept[sample]], unit_noise(bare, 32, SEED)[0])
    torch.testing.assert_close(noise.norm(dim=-1), kept.float())
    backwards = {name: tensor.flip(0) for name, tensor in batch.items()}
    assert torch.equal(unit_noise(backwards, 32, SEED), noise.flip(0))
    assert not torch.equal(unit_noise(batch, 32, SEED + 1)[kept], noise[kept])
    assert not torch.equal(noise[0, 11], noise[1, 7])


def test_standard_error_over_samples(llama: PreTrainedModel) -> None:
    """Of samples of equal length it is that of a plain mean."""
    batch = tiny.make_batch(samples=5)
    singles = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(5)]
    each = np.array([measured(llama, single).ratio for single in singles])
    profile = measured(llama, batch)
    np.testing.assert_allclose(profile.ratio, each.mean(axis=0), rtol=1e-5)
    expected = each.std(axis=0, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(profile.ratio_error, expected, rtol=1e-3, atol=1e-7)
    assert np.isnan(measured(llama, singles[0]).ratio_error).all()


def with_sink(model: PreTrainedModel) -> tuple[PreTrainedModel, dict]:
    """Token 3, at position 0 or 5 of a sample, has a 1000 times longer embedding."""
    model.get_input_embeddings().weight.data[3] *= 1000
    batch = tiny.make_batch(samples=2)
    batch["input_ids"].clamp_(min=4)
    batch["input_ids"][0, 0] = batch["input_ids"][1, 5] = 3
    return model, batch


def test_planted_sink_is_spared_and_reported(llama: PreTrainedModel) -> None:
    model, batch = with_sink(llama)
    profile = measured(model, batch, sink_tokens="auto")
    assert profile.spared == {0: [0, 5], 1: [0, 5], 2: [0, 5]}
    assert profile.tokens == 2 * 12 - 2
    perturbed = measured(model, batch, sink_tokens="perturb")
    assert perturbed.spared == {} and perturbed.tokens == 24
    assert profile.drift[0, 0] == pytest.approx(ETA, rel=1e-4)
    # the sink itself stays without noise, which would reach all tokens after it
    blocks = find_blocks(model).modules
    drift, ratio, _ = naive.noise_profile(model, blocks, batch, ETA, SEED, spared=3)
    np.testing.assert_allclose(profile.drift, drift, rtol=1e-4)
    np.testing.assert_allclose(profile.ratio, ratio, rtol=1e-4)
    assert not np.allclose(perturbed.ratio[:2], profile.ratio[:2], rtol=1e-2)


def test_no_sink_no_token_spared(llama: PreTrainedModel) -> None:
    profile = measured(llama, tiny.make_batch(), sink_tokens="auto")
    assert profile.spared == {} and profile.tokens == 36


@pytest.mark.parametrize(
    "padding, first", [(None, [0]), ("right", [0]), ("left", [0, 2, 4])]
)
def test_spare_leaves_out_the_first_token_that_is_no_padding(
    llama: PreTrainedModel, padding: str | None, first: list[int]
) -> None:
    batch = tiny.make_batch(padding=padding)
    profile = measured(llama, batch, sink_tokens="spare")
    assert profile.spared == {index: first for index in range(3)}
    assert profile.tokens == batch["attention_mask"].sum() - 3


def test_all_tokens_spared_is_an_error(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no token to put noise on"):
        measured(llama, tiny.make_batch(tokens=1), sink_tokens="spare")


def test_planted_amplifier_gets_a_ratio_above_one_and_is_protected() -> None:
    """
    Block 2 reads what block 1 writes with outputs far larger than the residual stream,
    so noise after blocks 0 and 1 grows there, and noise after block 2 does not.
    """
    model = tiny.make_model("llama", num_hidden_layers=4, initializer_range=0.02)
    blocks = find_blocks(model).modules
    for block in blocks:
        block.self_attn.o_proj.weight.data.zero_()
    quiet = measured(model, tiny.make_batch())
    assert np.abs(np.log(quiet.ratio)).max() < 0.05
    # relative to the norm of its output a block with a steep MLP turns noise up
    generator = torch.Generator().manual_seed(0)
    mlp = blocks[2].mlp
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight.data.normal_(generator=generator)
    loud = measured(model, tiny.make_batch())
    assert (loud.ratio[:2] > 1.2).all()
    assert loud.ratio[2] == pytest.approx(1.0, abs=0.05)
    direction = direction_from_ratio(loud.ratio)
    assert (direction[:2] < 0).all() and (direction[2:] > 0).all()


def test_floor_in_16_bits_is_the_drift_from_a_float32_run() -> None:
    for name, dtype in (("llama", torch.bfloat16), ("gpt_neox", torch.float16)):
        model = tiny.make_model(name).to(dtype)
        batch = tiny.make_batch(padding="right")
        before = tiny.snapshot(model)
        profile = measured(model, batch)
        tiny.assert_untouched(model, before)
        kept = batch["attention_mask"].bool()
        narrow = naive.states(model, find_blocks(model).modules, batch)
        wide_model = copy.deepcopy(model).float()
        wide = naive.states(wide_model, find_blocks(wide_model).modules, batch)
        expected = [
            ((n.float() - w).norm(dim=-1) / n.float().norm(dim=-1))[kept].mean()
            for n, w in zip(narrow, wide)
        ]
        np.testing.assert_allclose(profile.floor, expected, rtol=0.1)
        unit = torch.finfo(dtype).eps
        assert unit / 10 < profile.floor[0] < profile.floor[-1] < 10 * unit


def test_floor_in_float32_is_the_drift_of_one_rounding_unit(
    any_model: PreTrainedModel,
) -> None:
    profile = measured(any_model, tiny.make_batch())
    unit = torch.finfo(torch.float32).eps
    assert profile.floor.shape == (3,)
    assert (profile.floor > unit / 10).all() and (profile.floor < 100 * unit).all()
    assert not profile.below_floor(ETA)


def test_float32_noise_in_a_16_bit_model_is_that_of_a_float32_model(
    any_model: PreTrainedModel,
) -> None:
    """Except for the embedding and the rotary embedding, which stay in 16 bits."""
    batch = tiny.make_batch(padding="left")
    narrow = any_model.bfloat16()
    before = tiny.snapshot(narrow)
    profile = measured(narrow, batch, dtype="float32")
    tiny.assert_untouched(narrow, before)
    wide = copy.deepcopy(narrow).float()
    drift, ratio, _ = naive.noise_profile(
        wide, find_blocks(wide).modules, batch, ETA, SEED
    )
    np.testing.assert_allclose(profile.ratio, ratio, rtol=0.05)
    np.testing.assert_allclose(profile.drift, drift, rtol=0.05)
    # what is left of rounding is that of float32
    assert profile.floor[-1] < 1e-4 < measured(narrow, batch).floor[-1]


def test_eta_below_the_floor_is_warned_of(warnings: list[str]) -> None:
    model, batch = tiny.make_model("llama").bfloat16(), tiny.make_batch()
    profile = measured(model, batch)
    limit = FLOOR_MARGIN * profile.floor[-1]
    assert profile.below_floor(0.99 * limit) and not profile.below_floor(1.01 * limit)
    profile.warn_if_below_floor(1.01 * limit)
    assert warnings == []
    profile.warn_if_below_floor(0.99 * limit)
    (line,) = warnings
    assert "magnitude=" in line and "dtype: float32" in line


class Sums:
    """A probe whose ratio is the mean of what its samples say."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def run(self, samples: list[dict]) -> None:
        self.seen += [sample["ratio"] for sample in samples]

    def result(self) -> NoiseProfile:
        values = np.array(self.seen)
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
        empty = np.zeros((1, 1))
        return NoiseProfile(
            empty,
            np.array([values.mean()]),
            np.array([error]),
            empty,
            len(values),
            len(values),
            {},
            np.zeros(1),
        )


@pytest.mark.parametrize(
    "spread, first, available, used",
    [
        (0.0, 2, 64, 2),
        (0.08, 2, 64, 4),  # the error is spread·√(n/(n−1))/√n
        (0.2, 2, 64, 32),
        (0.2, 2, 10, 10),
        (0.9, 4, 3, 3),
        (0.9, 1, 1, 1),
    ],
)
def test_samples_are_added_until_every_ratio_is_known(
    spread: float, first: int, available: int, used: int
) -> None:
    samples = [{"ratio": 1 + spread * (-1) ** i} for i in range(available)]
    probe = Sums()
    profile = measure_until(probe.run, probe, samples, first)
    assert profile.samples == used
    assert probe.seen == [sample["ratio"] for sample in samples[:used]]
    assert profile.uncertainty() <= KNOWN or used == available
