"""The search for the strength: judged on held-out text, never worse than its start."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from absorb_plugin.allocation import Base, Calibration, base_allocation
from absorb_plugin.budget import meet_budget
from absorb_plugin.correction import corrected, direction_from_response
from absorb_plugin.response import ResponseProbe
from absorb_plugin.strength import STRENGTHS, TIE, Search, search_strength
from helpers import naive, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sweep import ride
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.modifier import AbsorptionAllocationModifier
from absorb_plugin.plugins import build_allocator

SIZES = np.array([100, 200, 100, 200])
S, CAP = 0.6, 0.9
TOKENS = np.array([50, 100, 80])
UP = np.array([-1.0, -0.5, 0.5, 1.0])  # a direction: protect the early blocks
BASE = meet_budget(S + 0.08 * np.array([1.0, -1.0, 1.0, -1.0]), SIZES, S, CAP)
UNIFORM = np.full(4, S)

Loss = Callable[[np.ndarray], float]


class Text:
    """Held-out text on which an allocation costs `loss` nats per token."""

    def __init__(self, loss: Loss, noise: float = 0.0) -> None:
        self.loss, self.noise, self.asked = loss, noise, 0

    def __call__(
        self, candidates: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        self.asked += 1
        for candidate in candidates:
            assert SIZES @ candidate / SIZES.sum() == pytest.approx(S, abs=1e-6)
            assert (candidate >= 0).all() and (candidate <= CAP).all()
        losses = np.array([self.loss(candidate) for candidate in candidates])
        return losses[:, None] * TOKENS, TOKENS


def search(
    loss: Loss, direction: np.ndarray = UP, rounds: int = 3, base: np.ndarray = BASE
) -> Search:
    return search_strength(
        base, SIZES, S, CAP, lambda allocation: direction, Text(loss), rounds
    )


def distance_from(target: np.ndarray) -> Loss:
    return lambda allocation: 2 + float(np.abs(allocation - target).sum())


def step(start: np.ndarray, strength: float) -> np.ndarray:
    return meet_budget(corrected(start, UP, strength), SIZES, S, CAP)


def test_a_correction_that_can_only_harm_gets_strength_zero() -> None:
    found = search(distance_from(BASE))
    np.testing.assert_array_equal(found.sparsity, BASE)
    assert [entry.chosen for entry in found.rounds] == [0.0]
    assert found.start == "base"
    assert found.loss == found.base_loss == 2.0 < found.uniform_loss


def test_a_correction_that_helps_is_taken() -> None:
    found = search(distance_from(step(BASE, 0.1)), rounds=1)
    np.testing.assert_allclose(found.sparsity, step(BASE, 0.1))
    assert found.rounds[0].chosen == 0.1
    assert found.loss == pytest.approx(2.0)


def test_a_signal_turned_round_gets_a_negative_strength() -> None:
    found = search(distance_from(step(BASE, -0.05)), rounds=1)
    assert found.rounds[0].chosen == -0.05
    np.testing.assert_allclose(found.sparsity, step(BASE, -0.05))
    assert found.loss < found.base_loss


def test_uniform_is_the_start_where_it_scores_better() -> None:
    found = search(distance_from(UNIFORM))
    assert found.start == "uniform"
    np.testing.assert_array_equal(found.sparsity, UNIFORM)
    assert found.loss == found.uniform_loss == 2.0 < found.base_loss
    further = search(distance_from(step(UNIFORM, 0.2)), rounds=1)
    assert further.start == "uniform" and further.rounds[0].chosen == 0.2
    np.testing.assert_allclose(further.sparsity, step(UNIFORM, 0.2))


def test_a_tie_goes_to_the_smaller_strength() -> None:
    """All strengths on the positive side help, the larger ones by a hair more."""

    def loss(allocation: np.ndarray) -> float:
        relief = S - float(allocation[0])
        return 2.0 - 0.1 * (relief > 1e-6) - 0.9 * TIE * max(0.0, relief)

    smallest = min(beta for beta in STRENGTHS if beta > 0)
    assert search(loss, rounds=1, base=UNIFORM).rounds[0].chosen == smallest


def test_no_gain_beyond_a_tie_is_no_gain() -> None:
    def loss(allocation: np.ndarray) -> float:
        return 2.0 - 0.9 * TIE * float(allocation[0] < S - 1e-6)

    found = search(loss, base=UNIFORM)
    assert min(found.rounds[0].losses) < 2.0
    assert found.rounds[0].chosen == 0.0


def test_a_gain_within_its_standard_error_is_no_gain() -> None:
    def score(candidates: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        moved = np.array([c[0] < S - 1e-6 for c in candidates], dtype=float)
        # one sample gains much, the others lose
        gains = np.array([-0.1, 0.4, -0.1])
        return (2.0 - moved[:, None] * gains) * TOKENS, TOKENS

    found = search_strength(UNIFORM, SIZES, S, CAP, lambda a: UP, score, 1)
    mean = found.rounds[0].losses
    assert min(mean) < 2.0 - 10 * TIE  # the mean over all tokens would have taken it
    assert found.rounds[0].chosen == 0.0
    np.testing.assert_array_equal(found.sparsity, UNIFORM)


def test_rounds_start_where_the_last_one_ended() -> None:
    """A round that does not take the largest strength is followed by half of all."""
    measured: list[np.ndarray] = []

    def measure(allocation: np.ndarray) -> np.ndarray:
        measured.append(allocation)
        return UP

    first = step(BASE, 0.2)
    target = step(first, 0.1)
    text = Text(distance_from(target))
    found = search_strength(BASE, SIZES, S, CAP, measure, text, 5)
    assert [entry.chosen for entry in found.rounds] == [0.2, 0.1, 0.0]
    np.testing.assert_allclose(measured, [BASE, first, target])
    np.testing.assert_allclose(found.sparsity, target)
    largest = [max(entry.strengths) for entry in found.rounds]
    assert largest == [0.2, 0.2, 0.1]
    for entry in found.rounds:
        assert entry.strengths == sorted(entry.strengths)
        assert len(entry.losses) == len(entry.strengths)
    # whether the signal points the wrong way shows in the first round
    assert found.rounds[0].strengths == sorted([0.0, *STRENGTHS])
    assert [min(entry.strengths) for entry in found.rounds] == [-0.05, 0.0, 0.0]


def test_the_search_stops_after_a_round_of_zero() -> None:
    text = Text(distance_from(BASE))
    search_strength(BASE, SIZES, S, CAP, lambda a: UP, text, 5)
    assert text.asked == 2  # base and uniform, then one round


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 0.9), min_size=4, max_size=4),
    st.lists(st.floats(-1, 1), min_size=4, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.integers(1, 3),
)
def test_never_worse_than_base_or_uniform(
    wished: list[float], direction: list[float], slope: list[float], rounds: int
) -> None:
    base = meet_budget(np.array(wished), SIZES, S, CAP)

    def loss(allocation: np.ndarray) -> float:
        return 5 + float(allocation @ np.array(slope)) + float((allocation**2).sum())

    found = search(loss, np.array(direction), rounds, base)
    assert found.loss <= found.base_loss + 1e-12
    assert found.loss <= found.uniform_loss + 1e-12
    assert found.loss == pytest.approx(loss(found.sparsity))
    assert SIZES @ found.sparsity / SIZES.sum() == pytest.approx(S, abs=1e-6)


class Stage(Text):
    """A rehearsal, which remembers whom it has seen."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss)
        self.seen: list[np.ndarray] = []

    def __call__(
        self, candidates: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        self.seen += candidates
        return super().__call__(candidates)


def rehearse(
    masks: Loss, pruner: Loss, base: np.ndarray = BASE
) -> tuple[Search, Stage]:
    stage = Stage(pruner)
    found = search_strength(
        base, SIZES, S, CAP, lambda allocation: UP, Text(masks), 1, stage
    )
    return found, stage


GOAL = step(BASE, 0.2)
HALF = meet_budget((BASE + GOAL) / 2, SIZES, S, CAP)


def test_what_stands_the_rehearsal_is_kept() -> None:
    found, stage = rehearse(distance_from(GOAL), distance_from(GOAL))
    np.testing.assert_allclose(found.sparsity, GOAL)
    assert found.rehearsed is not None and found.rehearsed.chosen == "searched"
    assert found.rehearsed.losses.keys() == {"base", "searched"}
    assert found.rehearsed.losses["searched"] == pytest.approx(2.0)
    assert len(stage.seen) == 2 and stage.asked == 1


def test_what_fails_the_rehearsal_is_taken_back() -> None:
    found, stage = rehearse(distance_from(GOAL), distance_from(BASE))
    np.testing.assert_array_equal(found.sparsity, BASE)
    assert found.rehearsed is not None and found.rehearsed.chosen == "base"
    assert found.rehearsed.losses.keys() == {"base", "searched", "halfway"}
    assert found.rounds[0].chosen == 0.2 and found.loss == pytest.approx(2.0)


def test_halfway_is_tried_before_all_is_given_up() -> None:
    def pruner(allocation: np.ndarray) -> float:
        overdone = 3.0 * (np.abs(allocation - GOAL).sum() < 1e-6)
        return distance_from(HALF)(allocation) + overdone

    found, stage = rehearse(distance_from(GOAL), pruner)
    np.testing.assert_allclose(found.sparsity, HALF)
    assert found.rehearsed is not None and found.rehearsed.chosen == "halfway"
    assert len(stage.seen) == 3


def test_the_rehearsal_chooses_between_base_and_uniform() -> None:
    """Masks say uniform; the pruner clearly says base, and the search starts there."""
    found, stage = rehearse(distance_from(UNIFORM), distance_from(BASE))
    assert found.start == "base" and found.uniform_loss < found.base_loss
    np.testing.assert_array_equal(found.sparsity, BASE)
    np.testing.assert_array_equal(stage.seen[:2], [BASE, UNIFORM])
    found, stage = rehearse(distance_from(UNIFORM), distance_from(UNIFORM))
    assert found.start == "uniform" and len(stage.seen) == 2
    np.testing.assert_array_equal(found.sparsity, UNIFORM)
    assert found.rehearsed is not None and found.rehearsed.chosen == "uniform"
    # too close to call: the search goes by masks, and so does its start
    found, _ = rehearse(
        distance_from(UNIFORM),
        lambda a: 2.0 - 0.9 * TIE * float(np.abs(a - BASE).sum() < 1e-6),
    )
    assert found.start == "uniform" and found.rehearsed is not None
    assert found.rehearsed.chosen == "base"


def test_nothing_is_rehearsed_where_nothing_was_found() -> None:
    found, stage = rehearse(distance_from(BASE), distance_from(GOAL))
    assert stage.asked == 0 and found.rehearsed is None


def test_an_overflow_fails_the_rehearsal() -> None:
    def pruner(allocation: np.ndarray) -> float:
        return 2.0 if np.abs(allocation - BASE).sum() < 1e-6 else float("nan")

    found, _ = rehearse(distance_from(GOAL), pruner)
    np.testing.assert_array_equal(found.sparsity, BASE)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 0.9), min_size=4, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_never_worse_than_base_in_the_rehearsal(
    wished: list[float], masks: list[float], pruner: list[float]
) -> None:
    base = meet_budget(np.array(wished), SIZES, S, CAP)

    def loss(slope: list[float]) -> Loss:
        return lambda a: 5 + float(a @ np.array(slope)) + float((a**2).sum())

    found, stage = rehearse(loss(masks), loss(pruner), base)
    final = loss(pruner)(found.sparsity)
    assert final <= loss(pruner)(base) + 1e-9
    if found.rehearsed is not None:
        losses = found.rehearsed.losses
        assert losses[found.rehearsed.chosen] == pytest.approx(final)
    assert SIZES @ found.sparsity / SIZES.sum() == pytest.approx(S, abs=1e-6)


def calibration_of(
    model: PreTrainedModel, samples: int, **fields: object
) -> Calibration:
    settings = AbsorptionAllocationModifier(**fields)
    return Calibration(model, find_blocks(model), [tiny.make_batch(samples)], settings)


def spied(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> dict[str, set[tuple[int, ...]]]:
    """What each kind of sweep is run on."""
    seen: dict[str, set[tuple[int, ...]]] = {}

    def keep(samples: list[dict], passenger: object, what: str) -> None:
        rows = {tuple(row.tolist()) for s in samples for row in s["input_ids"]}
        seen[what] = rows
        original(samples, passenger, what)

    original = calibration._sweep
    monkeypatch.setattr(calibration, "_sweep", keep)
    return seen


@pytest.mark.parametrize("signal", ["gradient", "response", "noise"])
@pytest.mark.parametrize("samples, held_out", [(2, 1), (5, 2), (12, 3)])
def test_held_out_samples_serve_nothing_else(
    llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    signal: str,
    samples: int,
    held_out: int,
) -> None:
    calibration = calibration_of(
        llama, samples, signal=signal, strength="auto", holdout_samples=3
    )
    seen = spied(calibration, monkeypatch)
    statistics = calibration.statistics(True)
    allocator = build_allocator("uniform", {})
    blocks = find_blocks(llama)
    base = base_allocation(allocator, blocks, statistics, 0.5, "block", 0.9)
    absorption = calibration.absorption()
    calibration.direction(base.sparsity, base, absorption, statistics)
    calibration.score([base.sparsity], base, statistics)
    out = seen.pop("Held-out loss")
    assert len(out) == held_out
    assert seen.keys() >= {"Input statistics"} and len(seen) == 2
    for what, rows in seen.items():
        assert rows and not rows & out, what


def test_every_round_is_measured_on_other_samples(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = calibration_of(
        llama, 8, signal="gradient", strength=0.1, signal_samples=3
    )
    seen = spied(calibration, monkeypatch)
    statistics, blocks = calibration.statistics(True), find_blocks(llama)
    allocator = build_allocator("uniform", {})
    base = base_allocation(allocator, blocks, statistics, 0.5, "block", 0.9)
    rounds = []
    for _ in range(3):
        calibration.direction(base.sparsity, base, None, statistics)
        rounds.append(seen.pop("Loss slope"))
        assert len(rounds[-1]) == 3
    assert not rounds[0] & rounds[1]
    assert len(rounds[0] | rounds[1] | rounds[2]) == 8


def test_response_counts_per_weight(llama: PreTrainedModel) -> None:
    """The budget is one of weights: a small block that helps as much helps more."""
    whole = find_blocks(llama)
    small = [name for name in whole.linears() if "layers.0.self_attn" in name]
    blocks = whole.restrict(
        [name for name in whole.linears() if "layers.0" not in name] + small
    )
    settings = AbsorptionAllocationModifier(signal="response", strength=0.1)
    batch = tiny.make_batch(4)
    calibration = Calibration(llama, blocks, [batch], settings)
    statistics = calibration.statistics(True)
    base = Base(np.full(3, 0.5), np.zeros(3), {}, {})
    found = calibration.direction(base.sparsity, base, None, statistics)
    probe = ResponseProbe(blocks, statistics, base.sparsity, settings.response_step)
    ride(llama, [batch], probe)
    per_weight = probe.response().response / blocks.parameters
    expected = direction_from_response(per_weight)
    np.testing.assert_allclose(
        found / np.abs(found).max(), expected / np.abs(expected).max(), rtol=1e-4
    )


@pytest.mark.parametrize("blocks, signal", [(3, "response"), (7, "gradient")])
def test_auto_takes_the_cheaper_signal(blocks: int, signal: str) -> None:
    model = tiny.make_model("llama", num_hidden_layers=blocks)
    assert calibration_of(model, 2, signal="auto").signal == signal


def test_probes_see_the_first_tokens_alone(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = calibration_of(
        llama, 4, signal="response", strength="auto", probe_tokens=5
    )
    seen = spied(calibration, monkeypatch)
    statistics, blocks = calibration.statistics(True), find_blocks(llama)
    allocator = build_allocator("uniform", {})
    base = base_allocation(allocator, blocks, statistics, 0.5, "block", 0.9)
    calibration.direction(base.sparsity, base, None, statistics)
    calibration.score([base.sparsity], base, statistics)
    lengths = {what: {len(row) for row in rows} for what, rows in seen.items()}
    assert lengths == {
        "Input statistics": {12},
        "Response probe": {5},
        "Held-out loss": {5},
    }


def test_one_sample_cannot_be_held_out(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="num_calibration_samples"):
        calibration_of(llama, 1, strength="auto")
    calibration_of(llama, 1, strength=0.1)


def test_planted_block_is_protected_by_auto() -> None:
    """
    All the knowledge of the model sits in block 1: it alone turns a token into the
    next. Pruning it costs, pruning the idle blocks 0 and 2 costs nothing.
    """
    model = tiny.make_model("llama", initializer_range=0.02)
    train_block(model, 1)
    blocks = find_blocks(model)
    modifier = AbsorptionAllocationModifier(
        allocator="uniform", signal="gradient", strength="auto"
    )
    allocation = modifier.allocate(model, blocks, [chain_batch(12)], 0.6)
    assert allocation.search is not None
    assert allocation.search.rounds[0].chosen > 0
    assert allocation.direction[1] < 0
    assert allocation.sparsity[1] < 0.6 - 0.04
    assert allocation.search.loss < allocation.search.base_loss - 0.01
    sums = naive.square_sums(model, blocks, chain_batch(12))
    losses = []
    for sparsities in (allocation.base.sparsity, allocation.sparsity):
        pruned = naive.masked(model, sums, naive.per_linear(blocks, sparsities))
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
