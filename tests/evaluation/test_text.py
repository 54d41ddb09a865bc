import gzip
import json
from pathlib import Path

import pytest
from helpers.words import make_tokenizer, words

from absorb_plugin.evaluation.text import (
    calibration_samples,
    evaluation_windows,
    prefix_ids,
    read_dataset,
    read_text,
    token_windows,
)


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_plain_text_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\u2028three\n")
    assert read_text(path) == ["one\n\ntwo\u2028three\n"]


def test_json_lines_are_documents(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": "one\ntwo", "id": 1}, {"text": "a\u2028b"}]
    )
    path.write_text(path.read_text() + '\n{"text": "  "}\n')
    assert read_text(path) == ["one\ntwo", "a\u2028b"]


def test_compressed_json_lines(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert read_text(path) == ["one", "two"]


def test_dataset_by_name(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    assert read_dataset(str(tmp_path)) == ["one", "two"]


def test_dataset_without_text_names_its_columns(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"body": "one", "id": 1}])
    with pytest.raises(ValueError, match=r"no text column `text`, only: body, id"):
        read_dataset(str(tmp_path))


def test_unknown_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}])
    with pytest.raises(ValueError, match="cannot load dataset .*split 'dev'"):
        read_dataset(str(tmp_path), "dev")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.txt: no such text file"):
        read_text(tmp_path / "a.txt")


def test_directory(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.txt", b"caf\xe9 au lait", "as UTF-8 text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b", "id": 1}\n',
            "line 2: no field `text`; the fields are: body, id",
        ),
        ("a.jsonl", b'\n\n{"body": "b"}\n', "line 3: no field `text`"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'["text"]\n', "line 1: not a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field `text` is not a string"),
    ],
)
def test_unusable_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(path)


@pytest.mark.parametrize(("bos", "prefix"), [(True, [1]), (False, [])])
def test_prefix_is_what_the_tokenizer_puts_in_front(bos, prefix):
    assert prefix_ids(make_tokenizer(bos)) == prefix


@pytest.mark.parametrize("bos", [True, False])
def test_windows_hold_the_text_in_order(bos):
    tokenizer = make_tokenizer(bos)
    documents = [words(25, seed=1), words(30, seed=2)]
    windows = token_windows(documents, tokenizer, 8)
    text = 7 if bos else 8
    assert len(windows) == 55 // text
    assert all(len(window) == 8 for window in windows)
    assert all(window[0] == 1 for window in windows) == bos
    found = [token for window in windows for token in window[-text:]]
    expected = tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    assert found == expected[: len(found)]


def test_windows_need_room_for_text():
    with pytest.raises(ValueError, match="window of 1 tokens is too short"):
        token_windows(["word1 word2"], make_tokenizer(bos=True), 1)


def test_calibration_samples_are_windows_chosen_by_seed():
    tokenizer = make_tokenizer(bos=True)
    documents = [words(300)]
    windows = token_windows(documents, tokenizer, 16)
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
    windows = token_windows(documents, tokenizer, 16)
    assert evaluation_windows(documents, tokenizer, 16) == windows
    assert evaluation_windows(documents, tokenizer, 16, 2) == windows[:2]


def test_too_little_text_says_how_much_there_is():
    tokenizer = make_tokenizer(bos=False)
    with pytest.raises(ValueError, match=r"fills only 6 such windows \(96 tokens\)"):
        calibration_samples([words(100)], tokenizer, 7, 16)
    with pytest.raises(ValueError, match="1 windows of 128 tokens .* only 0"):
        evaluation_windows([words(100)], tokenizer, 128)
    with pytest.raises(ValueError, match="at least one window"):
        calibration_samples([words(100)], tokenizer, 0, 16)
