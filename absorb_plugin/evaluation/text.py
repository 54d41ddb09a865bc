"""Text in, windows of tokens out: for calibration and for perplexity."""

import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from loguru import logger

from absorb_plugin.files import json_object

__all__ = [
    "calibration_samples",
    "evaluation_windows",
    "prefix_ids",
    "read_dataset",
    "read_text",
    "token_windows",
]

Tokenizer = Any  # PreTrainedTokenizerBase, whose import would cost seconds

JSON_LINES = {".jsonl", ".ndjson", ".json"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}

# Between two documents, and between them in the count of what is read.
SEPARATOR = "\n\n"

# Hub datasets are streamed, and reading stops here: some of them hold terabytes. It is
# far more text than any calibration or evaluation uses (about 10 million tokens).
DATASET_CHARACTERS = 40_000_000


def read_text(path: Path) -> list[str]:
    """
    Read a plain text file as one document, or JSON lines (.jsonl, .ndjson, .json) as
    one document per line. Compressed files (.gz, .bz2, .xz, .zst) work as well.

    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is a directory, empty, not UTF-8, or a line has no string
        `text`; the message names the line
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such text file")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    by_line = _suffix(path) in JSON_LINES
    rows = _read_rows(path, "line" if by_line else "document")
    documents = list(_texts_of_json_lines(path, rows)) if by_line else rows
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents


def read_dataset(name: str, split: str = "train") -> list[str]:
    """
    Stream a dataset with a column `text`, up to `DATASET_CHARACTERS` characters.

    :param name: `NAME` or `NAME:CONFIG`, e.g. `Salesforce/wikitext:wikitext-2-raw-v1`
    :raises ValueError: if the dataset cannot be loaded or has no column `text`
    """
    path, _, config = name.partition(":")
    try:
        rows = load_dataset(path, config or None, split=split, streaming=True)
    except Exception as error:  # each kind of dataset has its own errors
        raise ValueError(
            f"cannot load dataset {name!r}, split {split!r}: {error}"
        ) from error
    documents: list[str] = []
    characters = 0
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise ValueError(
                f"dataset {name!r} has no text column `text`, only: "
                f"{', '.join(sorted(row))}"
            )
        if row["text"].strip():
            documents.append(row["text"])
            characters += len(row["text"]) + len(SEPARATOR)
        if characters >= DATASET_CHARACTERS:
            logger.info(
                f"Using the first {len(documents)} documents of {name}, split {split}"
            )
            break
    if not documents:
        raise ValueError(f"dataset {name!r}, split {split!r}, holds no text")
    return documents


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """
    The special tokens that `tokenizer(text)` puts in front of a text: BOS for Llama,
    Gemma and OPT, nothing for SmolLM2, Qwen and GPT-NeoX. A model that was trained
    with BOS in front is not itself without it (its attention sink sits there).
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return list(special[:start])
    raise ValueError(
        f"{type(tokenizer).__name__} tokenises a text differently with special tokens "
        "than without: cannot tell which tokens belong in front of a window"
    )


def token_windows(
    documents: Sequence[str], tokenizer: Tokenizer, length: int
) -> list[list[int]]:
    """
    Tokenise the documents, put them one after the other, and cut without overlap. What
    is left at the end is dropped.

    :param documents: texts; a blank line is put between two of them
    :param length: tokens per window, the prefix of `prefix_ids` included
    :return: windows of exactly `length` tokens, in the order of the text
    :raises ValueError: if `length` leaves no room for text
    """
    prefix = prefix_ids(tokenizer)
    step = length - len(prefix)
    if step < 1 or length < 2:
        raise ValueError(f"a window of {length} tokens is too short to hold text")
    last = len(documents) - 1
    texts = [text + SEPARATOR if i < last else text for i, text in enumerate(documents)]
    # verbose=False: that a whole text is longer than the model's context is the point
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = [token for document in encoded for token in document]
    return [
        prefix + tokens[start : start + step]
        for start in range(0, len(tokens) - step + 1, step)
    ]


def calibration_samples(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    samples: int,
    length: int,
    seed: int = 0,
) -> Dataset:
    """
    Windows from all over the text, chosen by `seed` alone.

    :param samples: number of windows, N
    :param length: tokens per window, T
    :return: N rows of `input_ids` and `attention_mask`, T tokens each, in text order
    :raises ValueError: if the text has fewer than N windows
    """
    windows = _enough(token_windows(documents, tokenizer, length), samples, length)
    chosen = sorted(random.Random(seed).sample(range(len(windows)), samples))
    return Dataset.from_dict(
        {
            "input_ids": [windows[i] for i in chosen],
            "attention_mask": [[1] * length for _ in chosen],
        }
    )


def evaluation_windows(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    count: int | None = None,
) -> list[list[int]]:
    """
    The first `count` windows of the text, or all of them.

    :raises ValueError: if the text has fewer than `count` windows, or not a single one
    """
    windows = token_windows(documents, tokenizer, length)
    wanted = 1 if count is None else count
    return _enough(windows, wanted, length)[:count]


def _enough(windows: list[list[int]], wanted: int, length: int) -> list[list[int]]:
    if wanted < 1:
        raise ValueError(f"at least one window is needed, not {wanted}")
    if len(windows) < wanted:
        raise ValueError(
            f"the text is too short: {wanted} windows of {length} tokens need "
            f"{wanted * length} tokens, and it fills only {len(windows)} such windows "
            f"({len(windows) * length} tokens). Give more text, fewer windows or a "
            "smaller seq_len."
        )
    return windows


def _suffix(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def _read_rows(path: Path, sample_by: str) -> list[str]:
    # A cache of one's own: the user's would keep a second copy of every file read.
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = load_dataset(
                "text",
                data_files=str(path),
                split="train",
                sample_by=sample_by,
                cache_dir=cache,
                keep_in_memory=True,
            )
        except Exception as error:
            cause = error.__cause__ or error
            raise ValueError(f"cannot read {path} as UTF-8 text: {cause}") from error
        return list(rows["text"])


def _texts_of_json_lines(path: Path, lines: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = json_object(line, f"{path}, line {number}")
        if "text" not in record:
            fields = ", ".join(record) or "none at all"
            raise ValueError(
                f"{path}, line {number}: no field `text`; the fields are: {fields}"
            )
        if not isinstance(record["text"], str):
            raise ValueError(f"{path}, line {number}: field `text` is not a string")
        yield record["text"]
