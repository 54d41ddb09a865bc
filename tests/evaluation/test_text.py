import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.words import make_tokenizer, words
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from absorb_plugin.evaluation import text
from absorb_plugin.evaluation.text import (
    calibration_samples,
    evaluation_windows,
    prefix_ids,
    token_windows,
)


@pytest.mark.parametrize(("bos", "prefix"), [(True, [1]), (False, [])])
def test_prefix_is_what_the_tokenizer_puts_in_front(bos, prefix):
    assert prefix_ids(make_tokenizer(bos)) == prefix


@pytest.mark.parametrize(("bos", "prefix"), [(True, [1]), (False, [])])
def test_a_prefix_where_a_is_no_token(bos, prefix):
    tokenizer = make_tokenizer(bos)
    letters = models.BPE(vocab={"b": 0, "<s>": 1, "c": 2}, merges=[])
    tokenizer.backend_tokenizer.model = letters
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == []
    assert prefix_ids(tokenizer) == prefix


@pytest.mark.parametrize("bos", [True, False])
def test_windows_hold_the_text_in_order(bos):
    tokenizer = make_tokenizer(bos)
    documents = [words(25, seed=1), words(30, seed=2)]
    windows = list(token_windows(documents, tokenizer, 8))
    text = 7 if bos else 8
    assert len(windows) == 55 // text
    assert all(len(window) == 8 for window in windows)
    assert all(window[0] == 1 for window in windows) == bos
    found = [token for window in windows for token in window[-text:]]
    expected = tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    assert found == expected[: len(found)]


def test_windows_need_room_for_text():
    with pytest.raises(ValueError, match="window of 1 tokens is too short"):
        list(token_windows(["word1 word2"], make_tokenizer(bos=True), 1))


def test_calibration_samples_are_windows_chosen_by_seed():
    tokenizer = make_tokenizer(bos=True)
    documents = [words(300)]
    windows = list(token_windows(documents, tokenizer, 16))
    first = calibration_samples(documents, tokenizer, 5, 16, seed=3)
    again = calibration_samples(documents, tokenizer, 5, 16, seed=3)
    other = calibration_samples(documents, tokenizer, 5, 16, seed=4)
    assert first["input_ids"] == again["input_ids"] != other["input_ids"]
    assert first["attention_mask"] == [[1] * 16] * 5
    places = [windows.index(list(ids)) for ids in first["input_ids"]]
    assert places == sorted(set(places))


def test_evaluation_windows_are_the_first_ones():
    tokenizer = make_tokenizer(bos=False)
    documents = [words(100)]
    windows = list(token_windows(documents, tokenizer, 16))
    assert list(map(list, evaluation_windows(documents, tokenizer, 16))) == windows
    two = evaluation_windows(documents, tokenizer, 16, 2)
    assert list(map(list, two)) == windows[:2]


def test_too_little_text_says_how_much_there_is():
    tokenizer = make_tokenizer(bos=False)
    with pytest.raises(ValueError, match=r"fills only 6 such windows \(96 tokens\)"):
        calibration_samples([words(100)], tokenizer, 7, 16)
    with pytest.raises(ValueError, match="1 windows of 128 tokens .* only 0"):
        evaluation_windows([words(100)], tokenizer, 128)
    with pytest.raises(ValueError, match="at least one window"):
        calibration_samples([words(100)], tokenizer, 0, 16)


@pytest.mark.parametrize("bos", [True, False])
def test_windows_do_not_depend_on_the_batches(
    bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [words(k, seed=k) for k in (25, 3, 40, 1, 17)]
    tokenizer = make_tokenizer(bos)
    whole = list(token_windows(documents, tokenizer, 8))
    monkeypatch.setattr(text, "BATCH_CHARACTERS", 50)
    assert list(token_windows(iter(documents), tokenizer, 8)) == whole


def test_evaluation_reads_no_further_than_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def documents() -> Iterator[str]:
        yield words(40)
        yield words(40)
        raise AssertionError("read on")

    monkeypatch.setattr(text, "BATCH_CHARACTERS", 10)
    assert len(evaluation_windows(documents(), make_tokenizer(False), 16, 2)) == 2


def test_calibration_stops_reading_a_long_text(
    monkeypatch: pytest.MonkeyPatch, logs: list[str]
) -> None:
    endless = (words(20, seed=k) for k in itertools.count())
    monkeypatch.setattr(text, "CALIBRATION_CHARACTERS", 2000)
    samples = calibration_samples(endless, make_tokenizer(False), 5, 16)
    assert len(samples) == 5
    assert "the first" in logs[0] and "documents" in logs[0]


# --- chats ------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": words(9, 1)},
    {"role": "assistant", "content": words(9, 2)},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
)


def test_chats_go_through_the_template() -> None:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    (window,) = token_windows([CHAT], tokenizer, 21)
    spelled = " ".join(f"{turn['role']} {turn['content']}" for turn in CHAT)
    # one BOS, that of the window, and not another one from the template
    assert window == tokenizer(spelled)["input_ids"]


def test_chats_without_a_template() -> None:
    with pytest.raises(ValueError, match="holds chats.*no chat template"):
        list(token_windows([CHAT], make_tokenizer(True), 8))


def test_a_template_that_refuses() -> None:
    tokenizer = make_tokenizer(True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="chat 2 does not fit.*roles must alternate"):
        list(token_windows([words(9), CHAT], tokenizer, 8))


def test_tokenizers_without_any_special_token() -> None:
    tokenizer = make_tokenizer(False)
    bare: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert (bare.bos_token, bare.eos_token, bare.pad_token) == (None, None, None)
    samples = calibration_samples([words(100)], bare, 3, 16)
    assert len(samples) == 3
