"""Which samples serve what: none that judges serves anything else."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from helpers import runs, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from absorb_plugin.calibration import pad_to_batch, token_mask
from absorb_plugin.forward.probe import Probe
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.judges import PrunedLoss
from absorb_plugin.sample_split import PRUNING_WINDOW, SampleSplit
from absorb_plugin.settings import Effort

# Tokens of one sample; no two samples have a token in common, so each tells its own.
OWN = 40


def sample(number: int, length: int = 20) -> dict[str, torch.Tensor]:
    start = OWN * (number + 1)
    ids = torch.arange(start, start + length)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def numbers(samples: Iterable[dict]) -> list[int]:
    """Which samples these, or windows of them, are."""
    return [int(one["input_ids"].max()) // OWN - 1 for one in samples]


def effort(**fields: int) -> Effort:
    small = {"statistics": 5, "signal": 3, "search": 2, "confirm": 2, "tokens": 8}
    return Effort(**{"rounds": 3, "descents": 1, **small, **fields})


def split(samples: Sequence[dict], judged: bool = True, **fields: Any) -> SampleSplit:
    tokens = fields.pop("pruning_tokens", 0 if judged else None)
    return SampleSplit(
        samples, effort(**fields), judged=judged, by_loss=True, pruning_tokens=tokens
    )


COUNTS = st.integers(1, 12)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(2, 40), min_size=2, max_size=30),
    st.builds(
        dict, statistics=COUNTS, signal=COUNTS, search=COUNTS, confirm=st.integers(0, 9)
    ),
    st.integers(0, 2000),
)
def test_none_that_judges_serves_anything_else(
    lengths: list[int], fields: dict[str, int], pruning_tokens: int
) -> None:
    found = split(
        [sample(i, length) for i, length in enumerate(lengths)],
        pruning_tokens=pruning_tokens,
        **fields,
    )
    search, confirm = set(numbers(found.search)), set(numbers(found.confirm))
    measuring = set(numbers(found.in_turn()))
    others = set(numbers(found.statistics)) | set(numbers(found.pruning))
    signals = [numbers(found.next_signal()) for _ in range(20)]
    others |= {number for signal in signals for number in signal}
    assert search and confirm and others
    assert others <= measuring
    assert not measuring & (search | confirm)
    assert measuring | search | confirm == set(range(len(lengths)))
    # what is held out measures nothing: it is half at most, and little of many
    assert len(measuring) >= len(lengths) / 2
    if fields["confirm"]:
        assert len(measuring) >= 0.7 * len(lengths) - 2
    if len(lengths) >= 4 and fields["confirm"]:
        assert not search & confirm
    else:
        assert search == confirm
    if min(lengths) >= effort().tokens:
        assert len(search) <= fields["search"]
        assert len(confirm) <= (fields["confirm"] or len(search))
    # in turn: every sample that measures serves a signal at last
    if 20 * len(signals[0]) >= len(measuring):
        assert {number for signal in signals for number in signal} == measuring
    assert all(len(set(one)) == len(one) for one in signals)


def test_of_shorter_samples_more_are_taken() -> None:
    long = split([sample(i, 40) for i in range(60)])
    short = split([sample(i, 4) for i in range(60)])
    for name in ("search", "confirm", "pruning"):
        assert len(getattr(short, name)) == 2 * len(getattr(long, name)), name
    assert len(long.next_signal()) == 3 and len(short.next_signal()) == 6


def test_without_a_judge_all_samples_measure() -> None:
    samples = [sample(i) for i in range(6)]
    found = split(samples, judged=False, statistics=99)
    assert not found.search and not found.confirm and not found.pruning
    assert sorted(numbers(found.statistics)) == list(range(6))
    assert sorted(numbers(found.in_turn())) == list(range(6))
    assert split(samples[:1], judged=False).statistics


def test_one_sample_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="there is but one: raise num_calibration"):
        split([sample(0)])


def test_the_choice_depends_on_the_samples_alone() -> None:
    samples = [sample(i, 8 + i) for i in range(12)]
    found = split(samples)
    other = split([pad_to_batch(samples[5:]), pad_to_batch(samples[4::-1])])
    for name in ("search", "confirm", "statistics", "pruning"):
        mine, theirs = getattr(found, name), getattr(other, name)
        assert numbers(mine) == numbers(theirs), name
        for one, another in zip(mine, theirs, strict=True):
            ids = another["input_ids"][token_mask(another)]
            assert torch.equal(one["input_ids"][0], ids)
    for _ in range(3):
        assert numbers(found.next_signal()) == numbers(other.next_signal())


def test_every_judge_sees_short_and_long_samples() -> None:
    lengths = list(range(2, 34))
    samples = [sample(i, length) for i, length in enumerate(lengths)]
    found = split(samples, search=8, confirm=8, tokens=40)
    for judging in (found.search, found.confirm):
        seen = [one["input_ids"].shape[1] for one in judging]
        assert min(seen) < 10 and max(seen) > 25
        assert sum(seen) / len(seen) == pytest.approx(sum(lengths) / 32, abs=3)


def test_windows_are_pieces_from_anywhere() -> None:
    samples = [sample(i, 40) for i in range(32)]
    found = split(samples, search=8, confirm=8)
    starts: dict[str, list[int]] = {}
    for name, windows, length in (
        # of fewer samples than asked for: longer windows, so that tokens are as many
        ("search", found.search, 16),
        ("confirm", found.confirm, 13),
        ("pruning", found.pruning, 13),  # in one batch with those
        ("signal", [window for _ in range(3) for window in found.next_signal()], 8),
    ):
        for window in windows:
            ids = window["input_ids"][0]
            assert ids.tolist() == list(range(int(ids[0]), int(ids[0]) + length))
            starts.setdefault(name, []).append(int(ids[0]) % OWN)
    for name, places in starts.items():
        assert len(set(places)) > 2 and max(places) > 16, name
    assert all(one["input_ids"].shape[1] == 40 for one in found.statistics)


def test_copies_of_what_is_held_out_measure_nothing(warnings: list[str]) -> None:
    samples = [sample(i % 12, 40) for i in range(36)]
    found = split(samples, search=3, confirm=3)
    assert any("24 of 36 calibration samples are copies" in one for one in warnings)
    judging = set(numbers([*found.search, *found.confirm]))
    measuring = numbers(found.in_turn())
    assert len(judging) == 4 and not judging & set(measuring)
    assert len(measuring) == 3 * (12 - 4)
    picture = {**sample(20, 40), "pixel_values": torch.zeros(1, 3, 4, 4)}
    mixed = split([*samples, picture], search=3, confirm=3)
    judging = set(numbers([*mixed.search, *mixed.confirm]))
    assert not judging & set(numbers(mixed.in_turn()))
    alike = split([sample(0, 40) for _ in range(5)])
    assert alike.search and alike.in_turn() and len(alike.in_turn()) < 5


def test_a_sample_gives_other_windows_in_other_rounds() -> None:
    found = split([sample(i, 40) for i in range(4)], signal=2)
    assert len(found.in_turn()) == 2
    rounds = [found.next_signal() for _ in range(6)]
    assert all(sorted(numbers(one)) == sorted(numbers(rounds[0])) for one in rounds)
    places = {(int(one["input_ids"][0, 0])) for chosen in rounds for one in chosen}
    assert len(places) > 6


def test_a_first_token_that_all_share_begins_every_window() -> None:
    samples = [sample(i, 40) for i in range(16)]
    for one in samples:
        one["input_ids"][0, 0] = 1  # as a tokenizer with BOS does
    found = split(samples)
    windows = [*found.search, *found.confirm, *found.pruning, *found.next_signal()]
    assert all(int(one["input_ids"][0, 0]) == 1 for one in windows)
    assert any(int(one["input_ids"][0, 1]) % OWN > 1 for one in windows)
    samples[3]["input_ids"][0, 0] = 2
    assert not all(int(one["input_ids"][0, 0]) == 1 for one in split(samples).search)


def test_a_pruner_that_needs_more_tokens_gets_whole_samples() -> None:
    samples = [sample(i, 40) for i in range(16)]

    def tokens(wanted: int) -> int:
        pruning = split(samples, pruning_tokens=wanted).pruning
        return sum(one["input_ids"].numel() for one in pruning)

    assert tokens(0) == 2 * 8
    assert tokens(200) == 200
    assert tokens(10_000) == 12 * 40  # all that do not judge


def test_a_pruner_that_needs_more_tokens_sees_parts_of_long_samples() -> None:
    """More samples, not whole ones: what is judged is padded to their length."""
    samples = [sample(i, 2000) for i in range(16)]
    pruning = split(samples, pruning_tokens=2500).pruning
    assert [one["input_ids"].numel() for one in pruning] == [PRUNING_WINDOW] * 5
    pruning = split(samples, pruning_tokens=12 * PRUNING_WINDOW + 1).pruning
    assert {one["input_ids"].numel() for one in pruning} == {2 * PRUNING_WINDOW}
    assert sum(one["input_ids"].numel() for one in pruning) > 12 * PRUNING_WINDOW


def test_of_a_small_set_little_is_held_out_without_a_last_comparison() -> None:
    samples = [sample(i) for i in range(24)]
    alone = split(samples, search=9, confirm=0, pruning_tokens=None)
    both = split(samples, search=9, confirm=9)
    assert len(alone.search) == len(both.search) == 24 // 8
    assert alone.confirm is alone.search


@given(st.lists(st.integers(4, 40), min_size=4, max_size=12), st.integers(1, 300))
def test_a_pruner_gets_its_tokens_if_they_are_there(
    lengths: list[int], wanted: int
) -> None:
    """Also where short samples stand at the places that are picked."""
    samples = [sample(i, length) for i, length in enumerate(lengths)]
    found = split(samples, pruning_tokens=wanted)
    tokens = sum(one["input_ids"].numel() for one in found.pruning)
    held_out = set(numbers(found.search)) | set(numbers(found.confirm))
    there = sum(n for i, n in enumerate(lengths) if i not in held_out)
    assert tokens >= min(wanted, there)


def test_what_is_judged_with_long_windows_is_not_padded_to_their_length() -> None:
    samples = [sample(i, 2000) for i in range(24)]
    found = split(samples, search=2, confirm=2, tokens=40, pruning_tokens=2500)
    lengths = [{one["input_ids"].numel() for one in found.confirm}]
    lengths += [{one["input_ids"].numel() for one in found.search}]
    assert lengths == [{PRUNING_WINDOW}, {40}]


def test_the_report_tells_what_served() -> None:
    found = split([sample(i) for i in range(12)])
    assert {one.use for one in found.uses()} == {
        "statistics", "pruning", "search", "confirm"
    }  # fmt: skip
    signal = found.next_signal()
    found.next_signal()
    uses = {one.use: one for one in found.uses()}
    assert numbers(uses["signal"].samples) == numbers(signal)
    assert uses["signal"].tokens == 3 * 8
    assert uses["statistics"].tokens == 5 * 20
    assert numbers(uses["search"].samples) == numbers(found.search)


@pytest.mark.parametrize("kind", list(runs.PRUNERS))
@pytest.mark.parametrize("fields", [{}, {"strength": "auto", "confirm_samples": 0}])
def test_a_signal_that_prunes_has_samples_to_prune_by(
    kind: str, fields: dict[str, Any]
) -> None:
    found = runs.allocate(tiny.small(), kind=kind, signal="pruner", **fields)
    assert "pruning" in {one.use for one in found.samples}
    assert found.direction.any()


@pytest.mark.parametrize("kind", list(runs.PRUNERS))
@pytest.mark.parametrize("signal", ["gradient", "pruner", "response", "noise"])
def test_what_an_allocation_really_runs(
    monkeypatch: pytest.MonkeyPatch, kind: str, signal: str
) -> None:
    """Of all probes only the judges meet the samples that are held out."""
    seen: dict[str, set[int]] = {}
    judged: dict[str, list[int]] = {}
    run = ProbeRunner.run

    def spy(
        self: ProbeRunner,
        what: str,
        samples: Sequence[dict],
        probe: Probe,
        **how: bool,
    ) -> object:
        if isinstance(probe, PrunedLoss):
            split_at = probe._calibrating
            judged["confirm"] = numbers(samples[split_at:])
            seen.setdefault("pruning", set()).update(numbers(samples[:split_at]))
        elif what == "Held-out loss":
            judged["search"] = numbers(samples)
        else:
            seen.setdefault(what, set()).update(numbers(samples))
        return run(self, what, samples, probe, **how)

    monkeypatch.setattr(ProbeRunner, "run", spy)
    # whatever is found is taken, so that there is something to confirm
    monkeypatch.setattr("absorb_plugin.search.line_search.gain", lambda *_: (1.0, 0.0))
    found = runs.allocate(
        tiny.small(vocab_size=OWN * 18),
        [sample(i) for i in range(16)],
        kind=kind,
        signal=signal,
        strength="auto",
        report_dir="so that the noise probe runs",
    )
    assert set(seen) >= {"Input statistics", "Noise probe", "pruning"}
    assert found.confirmed is not None
    assert not set(judged["search"]) & set(judged["confirm"])
    held_out = {number for chosen in judged.values() for number in chosen}
    for what, samples in seen.items():
        assert not samples & held_out, what
