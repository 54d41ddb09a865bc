"""Calibration batches: read once, without a trace in the random state; cut, joined."""

import pytest
import torch
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel

from absorb_plugin.calibration import (
    calibrating,
    cut_tokens,
    evenly_spaced,
    has_media,
    interleaved,
    join_samples,
    pad_to_batch,
    read_batches,
    single_samples,
    sort_samples,
    split_samples,
    token_mask,
)


def loader(shuffle_by: str) -> DataLoader:
    rows = [{"input_ids": torch.tensor([i, i])} for i in range(20)]
    if shuffle_by == "global":
        return DataLoader(rows, batch_size=2, shuffle=True)
    generator = torch.Generator().manual_seed(3)
    if shuffle_by == "loader":
        return DataLoader(rows, batch_size=2, shuffle=True, generator=generator)
    return DataLoader(
        rows, batch_size=2, sampler=RandomSampler(rows, generator=generator)
    )


@pytest.mark.parametrize("shuffle_by", ["global", "loader", "sampler"])
def test_the_pruner_is_given_the_samples_that_we_saw(shuffle_by: str) -> None:
    orders = []
    for reading in (True, False):
        torch.manual_seed(0)
        data = loader(shuffle_by)
        if reading:
            seen = torch.cat([b["input_ids"] for b in read_batches(data)])
        orders.append(torch.cat([batch["input_ids"] for batch in data]))
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(seen, orders[0])
    assert seen[:, 0].tolist() != list(range(20))


@pytest.mark.parametrize(
    "data, message",
    [
        (None, r"no calibration data.*oneshot\(dataset="),
        ([], "has no token"),
        ([{"input_ids": torch.zeros(1, 0)}], "has no token"),
        ([{"text": ["a"], "pixels": torch.ones(1)}], r"no 'input_ids' but \['pixels"),
    ],
)
def test_missing_data(data: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_batches(data)


def test_what_is_no_tensor_is_left_out() -> None:
    batch = {**tiny.make_batch(), "text": ["a", "b", "c"]}
    (cached,) = read_batches([batch])
    assert cached.keys() == {"input_ids", "attention_mask"}


def test_what_goes_by_token_is_cut_where_the_ids_were() -> None:
    """llm-compressor's collator cuts ids and mask alone."""
    batch = tiny.make_batch(3, 16)
    uncut = torch.arange(20).expand(3, -1)
    for name in ("token_type_ids", "special_tokens_mask", "position_ids"):
        (read,) = read_batches([{**batch, name: uncut}])
        assert read[name].shape == (3, 16) and not has_media(read)
        assert torch.equal(read[name], uncut[:, :16])


def test_a_window_of_positions_does_not_jump() -> None:
    """Without a mask it would be another text to the model."""
    ids = torch.arange(40)[None]
    plain = {"input_ids": ids, "position_ids": ids}
    window = cut_tokens(plain, 8, "somewhere", first=True)["position_ids"][0]
    assert window.diff().eq(1).all() and window[0] > 0
    masked = {**plain, "attention_mask": torch.ones_like(ids)}
    assert cut_tokens(masked, 8, "somewhere", first=True)["position_ids"][0, 0] == 0


def test_split_and_join_are_inverse() -> None:
    batches = [tiny.make_batch(4), tiny.make_batch(2, tokens=5)]
    parts = list(split_samples(batches, 3))
    assert [len(part["input_ids"]) for part in parts] == [3, 1, 2]
    for joined, batch in zip(join_samples(parts), batches, strict=True):
        tiny.assert_same(joined, batch)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 50), st.integers(1, 60))
def test_evenly_spaced(length: int, count: int) -> None:
    chosen = evenly_spaced(range(length), count)
    assert len(chosen) == len(set(chosen)) == min(length, count)
    assert chosen == sorted(chosen)
    steps = [b - a for a, b in zip(chosen, chosen[1:])]
    assert not steps or max(steps) - min(steps) <= 1


@given(st.integers(0, 60))
def test_interleaved_begins_all_over(length: int) -> None:
    order = interleaved(range(length))
    assert sorted(order) == list(range(length))
    few = order[:8]
    assert few == sorted(few)
    assert length < 16 or max(few) - min(few) > length / 2


def test_padded_to_one_batch() -> None:
    samples = [tiny.make_batch(1, tokens, seed=tokens) for tokens in (5, 9, 7)]
    del samples[0]["attention_mask"]
    batch = pad_to_batch(samples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 9)
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 9, 7]
    for row, sample in enumerate(samples):
        mine = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert torch.equal(mine, sample["input_ids"][0])
    alike = [tiny.make_batch(1, 5, seed=seed) for seed in range(2)]
    for sample in alike:
        del sample["attention_mask"]
    assert pad_to_batch(alike).keys() == {"input_ids"}


@pytest.mark.parametrize("by_loss, kept", [(True, 2), (False, 3)])
def test_samples_of_no_use_are_left_out(
    by_loss: bool, kept: int, warnings: list[str]
) -> None:
    batch = tiny.make_batch(4)
    batch["attention_mask"][1] = 0
    batch["attention_mask"][2, 1:] = 0
    assert len(single_samples([batch], by_loss)) == kept
    (message,) = warnings
    assert message.startswith(f"{4 - kept} of 4 calibration samples are left out")


@pytest.mark.parametrize("padding", ["left", "right", None])
def test_cut_leaves_padding_out(padding: str | None) -> None:
    batch = tiny.make_batch(padding=padding)
    for sample in split_samples([batch], 1):
        kept = sample["attention_mask"].bool()
        cut = cut_tokens({**sample, "other": torch.ones(1)}, 5)
        assert torch.equal(cut["input_ids"][0], sample["input_ids"][kept][:5])
        assert cut["attention_mask"].tolist() == [[1] * 5]
        assert cut["other"].tolist() == [1.0]
        longer = cut_tokens(sample, 100)
        ids = longer["input_ids"][token_mask(longer)]
        assert torch.equal(ids, sample["input_ids"][kept])


def test_padding_between_tokens_is_left_out() -> None:
    """Of packed texts: a window has as many tokens as it should, wherever it lies."""
    sample = tiny.make_batch(1, 40)
    sample["attention_mask"][:, 8:30] = 0
    kept = sample["input_ids"][sample["attention_mask"].bool()].tolist()
    for salt in map(str, range(40)):
        cut = cut_tokens(sample, 6, salt)
        ids = cut["input_ids"][0].tolist()
        assert len(ids) == 6 and cut["attention_mask"].all()
        assert any(kept[i : i + 6] == ids for i in range(len(kept)))
    (single,) = single_samples([sample], by_loss=True)
    assert single["input_ids"][0].tolist() == kept


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("first", [False, True])
def test_windows_lie_anywhere_and_always_at_the_same_place(
    padding: str | None, first: bool
) -> None:
    batch = tiny.make_batch(3, 12, padding)
    starts: set[int] = set()
    for sample in split_samples([batch], 1):
        ids = sample["input_ids"][sample["attention_mask"].bool()].tolist()
        for salt in map(str, range(40)):
            cut = cut_tokens(sample, 4, salt, first)["input_ids"][0].tolist()
            again = cut_tokens(sample, 4, salt, first)["input_ids"][0].tolist()
            assert cut == again
            if first:
                assert cut[0] == ids[0]
                cut, ids = cut[1:], ids[1:]
            places = [i for i in range(len(ids)) if ids[i : i + len(cut)] == cut]
            assert places, "no window of the sample"
            starts.add(places[0])
            ids = sample["input_ids"][sample["attention_mask"].bool()].tolist()
    # of the longest sample the whole of it
    assert starts == set(range(12 - 4 + 1))


def test_token_mask() -> None:
    batch = tiny.make_batch(padding="left")
    assert torch.equal(token_mask(batch), batch["attention_mask"].bool())
    assert token_mask({"input_ids": batch["input_ids"]}).all()


def test_the_fixed_order_depends_on_the_samples_alone() -> None:
    samples = [tiny.make_batch(1, tokens, seed=tokens) for tokens in (5, 9, 7)]
    samples += [tiny.make_batch(1, 7, seed=seed) for seed in range(20)]
    ordered = [x["input_ids"].tolist() for x in sort_samples(samples)]
    lengths = [len(ids[0]) for ids in ordered]
    assert lengths == sorted(lengths, reverse=True)
    assert ordered != [x["input_ids"].tolist() for x in samples]
    padded = [
        {name: torch.nn.functional.pad(x, (3, 0)) for name, x in sample.items()}
        for sample in samples[::-1]
    ]
    again = [x["input_ids"][:, 3:].tolist() for x in sort_samples(padded)]
    assert again == ordered


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_stays_as_it_is_on_a_cpu(
    llama: PreTrainedModel, attention: str
) -> None:
    llama.set_attn_implementation(attention)
    with calibrating(llama):
        assert llama.config._attn_implementation == attention
    assert llama.config._attn_implementation == attention


def test_attention_is_as_llm_compressor_wants_it_elsewhere(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama.set_attn_implementation("sdpa")
    monkeypatch.setattr(
        "absorb_plugin.devices.get_execution_device",
        lambda model: torch.device("cuda"),
    )
    with calibrating(llama):
        assert llama.config._attn_implementation == "eager"
    assert llama.config._attn_implementation == "sdpa"
