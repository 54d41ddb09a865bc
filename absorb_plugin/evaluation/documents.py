"""
Documents from a file or a dataset of the hub, read one after the other, so that a
corpus of any size takes no more memory than its longest document.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import shlex
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import IO, Any, TextIO

import pyarrow
from datasets import load_dataset, load_from_disk
from loguru import logger
from pyarrow.parquet import ParquetFile

from absorb_plugin.files import check_letters, check_pointer, json_object

__all__ = ["SEPARATOR", "Document", "count_characters", "read_dataset", "read_text"]

# A text, or the turns of a chat.
Document = str | list[dict[str, Any]]

# Between two documents.
SEPARATOR = "\n\n"
# Plain text is one document, or several of so many characters: tokenising takes about
# a hundred bytes for each of them.
PIECE = 4_000_000
# Hub datasets are streamed, and reading stops here: some of them hold terabytes. It is
# far more text than any calibration or evaluation uses (about 10 million tokens).
DATASET_CHARACTERS = 40_000_000

JSON_LINES = {".jsonl", ".ndjson", ".json"}
TABLES = {".csv", ".tsv"}
DELIMITERS = ",;\t|"
# What is read where no column is named: the first of these that a row has.
COLUMNS = ("text", "messages")

OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda path: pyarrow.input_stream(
        str(path), compression="zstd"
    ),
}
DAMAGED = (EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException)
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
# Byte order marks of what is not UTF-8; that of UTF-32 begins like that of UTF-16.
MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read_text(path: Path, column: str | None = None) -> Iterator[Document]:
    """
    Plain text is one document. JSON lines (.jsonl, .ndjson, .json), a JSON array, CSV
    and TSV with a header, and parquet are one document per row. Compressed files (gzip,
    bzip2, xz, zstd) work as well. Documents of white space alone are left out.

    :param column: field of the rows; by default `text`, else `messages`
    :return: texts, or chats where the column holds turns with `role` and `content`
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: at once if it is a directory, empty or not UTF-8; while it is
        read if it holds no text, or a row has no such column; the message names the row
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such text file")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    kind = _kind(path)
    if kind == "text" and column is not None:
        raise ValueError(
            f"{path} is plain text and has no column {column!r}: leave it out, or name "
            "a JSON, CSV or parquet file"
        )
    return _checked(READERS[kind](path, column), str(path))


def read_dataset(
    name: str, split: str = "train", column: str | None = None
) -> Iterator[Document]:
    """
    Stream a dataset, up to `DATASET_CHARACTERS` characters.

    :param name: `NAME` or `NAME:CONFIG`, e.g. `Salesforce/wikitext:wikitext-2-raw-v1`;
        or a directory
    :param column: as in `read_text`
    :raises ValueError: if the dataset cannot be loaded or has no such column
    """
    if Path(name).is_file():
        raise ValueError(f"{name} is a file, not a dataset: give it as text")
    rows = _load_dataset(name, split)
    where = f"dataset {name!r}, split {split!r}"
    found = (_document(row, column, where) for row in rows)
    return _checked(_first_characters(found, where), where)


def _load_dataset(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    folder = Path(name)
    path, _, config = (name, "", "") if folder.is_dir() else name.partition(":")
    if folder.is_dir() and glob.escape(str(folder)) != str(folder):
        raise ValueError(
            f"{name}: datasets takes the path for a pattern, for it has one of *?[ in "
            "it. Rename the directory, or give a file of it as text"
        )
    try:
        if (folder / "state.json").is_file():
            return load_from_disk(name)
        if (folder / "dataset_dict.json").is_file():
            splits = load_from_disk(name)
            if split not in splits:
                raise ValueError(f"its splits are {', '.join(splits)}")
            return splits[split]
        return load_dataset(path, config or None, split=split, streaming=True)
    except Exception as error:  # each kind of dataset has its own errors
        other = ". Name another split" if "split" in str(error) else ""
        raise ValueError(
            f"cannot load dataset {name!r}, split {split!r}: {error}{other}"
        ) from error


def count_characters(document: Document) -> int:
    """In characters; of a chat, those of its turns."""
    if isinstance(document, str):
        return len(document)
    return sum(len(str(turn["content"])) for turn in document)


def _checked(documents: Iterable[Document], where: str) -> Iterator[Document]:
    """The first is read at once, so that what is wrong with all of them is found."""
    kept = (d for d in documents if not isinstance(d, str) or d.strip())
    first = next(kept, None)
    if first is None:
        raise ValueError(f"{where} holds no text")
    return chain([first], kept)


def _first_characters(documents: Iterable[Document], where: str) -> Iterator[Document]:
    characters = 0
    for count, document in enumerate(documents, start=1):
        yield document
        characters += count_characters(document)
        if characters >= DATASET_CHARACTERS:
            logger.info(f"Using the first {count} documents of {where}")
            return


def _kind(path: Path) -> str:
    """Which reader: by the first bytes, then by the name."""
    with _decompressed(path) as file:
        start = file.read(4096)
    check_pointer(path)
    if start.startswith(b"PAR1"):
        return "parquet"
    _check_encoding(path, start)
    suffix = _suffix(path)
    if suffix in JSON_LINES:
        begin = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        return "array" if begin.startswith(b"[") and suffix == ".json" else "lines"
    return "table" if suffix in TABLES else "text"


def _check_encoding(path: Path, start: bytes) -> None:
    for mark, encoding in MARKS.items():
        if start.startswith(mark):
            raise ValueError(
                f"{path} is {encoding} text, and UTF-8 is needed. Convert it: "
                f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > FILE"
            )
    if b"\0" in start:
        raise ValueError(
            f"{path} is no UTF-8 text, for it has NUL bytes: UTF-16 without a mark, or "
            "no text at all"
        )


def _suffix(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


@contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes; it is what its first bytes say, whatever its name says."""
    with path.open("rb") as file:
        magic = file.read(6)
    openers = [opener for mark, opener in OPENERS.items() if magic.startswith(mark)]
    try:
        with openers[0](path) if openers else path.open("rb") as file:
            yield file
    except (*DAMAGED, OSError) as error:
        # bz2 and pyarrow raise bare OSErrors; the system's have a number and the path
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is cut short or damaged: {error}") from error


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """As text, without byte order mark; `\\r\\n` is `\\n` unless `newline` says so."""
    with _decompressed(path) as raw:
        reader = io.BufferedReader(raw)  # type: ignore[type-var]  # zstd's has no peek
        with io.TextIOWrapper(reader, encoding="utf-8-sig", newline=newline) as file:
            try:
                yield file
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"cannot read {path} as UTF-8 text: {error}. Convert it with iconv"
                ) from error


def _read_plain(path: Path, column: None) -> Iterator[str]:
    with _opened(path) as file:
        rest = ""
        while len(chunk := file.read(PIECE)) == PIECE:
            # between paragraphs, where the separator of documents stands anyway
            text, rest = _cut(rest + chunk)
            yield text
        yield rest + chunk


def _cut(text: str) -> tuple[str, str]:
    """Where a text is between two paragraphs, or lines, or words; else at its end."""
    for between in (SEPARATOR, "\n", " "):
        before, found, after = text.rpartition(between)
        if found and before.strip():
            return before, after
    return text, ""


def _read_lines(path: Path, column: str | None) -> Iterator[Document]:
    with _opened(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _document(json_object(line, where), column, where)


def _read_array(path: Path, column: str | None) -> Iterator[Document]:
    with _opened(path) as file:
        try:
            rows = json.load(file)
        except ValueError as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            raise ValueError(f"{path}: not JSON: {error}") from error
        except RecursionError as error:
            raise ValueError(
                f"{path}: JSON that is nested too deeply to read"
            ) from error
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if isinstance(row, str):
            if column is not None:
                raise ValueError(
                    f"{where} is a string, which has no column {column!r}: leave "
                    "text_column out"
                )
            check_letters(row, where)
            yield row
        elif isinstance(row, dict):
            yield _document(row, column, where)
        else:
            raise ValueError(f"{where}: not a JSON object")


def _read_table(path: Path, column: str | None) -> Iterator[Document]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # 131,072 characters otherwise
    with _opened(path, newline="") as file:
        header = file.readline()
        if not header:
            return
        tabs = _suffix(path) == ".tsv"
        delimiter = "\t" if tabs else max(DELIMITERS, key=header.count)
        # A quote that opens a sentence, or is never closed, would reach for the next,
        # however many rows below, if that were not an error.
        lines = chain([header], file)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        names = next(_rows(rows, path), [])
        _check_header(header, names, column, path)
        for number, row in enumerate(_rows(rows, path), start=1):
            where = f"{path}, row {number}"
            if any(row[len(names) :]):
                raise ValueError(
                    f"{where} has {len(row)} fields, and the header {len(names)}. Put "
                    f"quotes around what has a {delimiter!r} in it, or give JSON lines"
                )
            values: Iterable[str | None] = chain(row, repeat(None))
            yield _document(dict(zip(names, values)), column, where)


def _check_header(
    header: str, names: Sequence[str], column: str | None, path: Path
) -> None:
    if not header.strip():
        raise ValueError(
            f"{path} begins with an empty line, where the names of the columns belong: "
            "delete it"
        )
    for name in COLUMNS if column is None else (column,):
        if names.count(name) > 1:
            raise ValueError(f"{path} has two columns {name!r}: rename one")
        if name in names:  # which is the one that is read
            return


def _rows(rows: Any, path: Path) -> Iterator[list[str]]:
    """Those of a reader of `csv` that are not empty."""
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {rows.line_num}: {error}: a quote is not closed, or "
                "something, if only a blank, stands behind a closed one. If quotes are "
                "letters in this file, give it as JSON lines"
            ) from error
        if row is None:
            return
        if row:
            yield row


def _read_parquet(path: Path, column: str | None) -> Iterator[Document]:
    with _decompressed(path) as raw:
        # compressed inside as a rule; around it, it is decompressed into memory
        packed = not isinstance(raw, io.BufferedReader)
        file = ParquetFile(io.BytesIO(raw.read()) if packed else path)
        chosen = _column(file.schema_arrow.names, column, str(path))
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[chosen]):
            for row in batch.to_pylist():
                number += 1
                yield _document(row, chosen, f"{path}, row {number}")


READERS: dict[str, Callable[[Path, Any], Iterator[Document]]] = {
    "text": _read_plain,
    "lines": _read_lines,
    "array": _read_array,
    "table": _read_table,
    "parquet": _read_parquet,
}


def _column(fields: Iterable[str], column: str | None, where: str) -> str:
    """The one that was asked for, or the first of `COLUMNS`."""
    fields = list(map(str, fields))
    names = COLUMNS if column is None else (column,)
    for name in names:
        if name in fields:
            return name
    wanted = " or ".join(f"`{name}`" for name in names)
    raise ValueError(
        f"{where}: no field {wanted}; the fields are: "
        f"{', '.join(fields) or 'none at all'}. Name one with text_column"
    )


def _document(row: Mapping[str, Any], column: str | None, where: str) -> Document:
    """
    :raises ValueError: if there is no such column, or it holds neither text nor a chat
    """
    name = _column(row, column, where)
    value = row[name]
    if value is None:
        return ""
    check_letters(value, f"{where}: field `{name}`")
    if isinstance(value, list) and value and all(map(_is_turn, value)):
        return [_as_text(turn, f"{where}: field `{name}`") for turn in value]
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field `{name}` is not a string, nor a chat of turns with `role` "
            "and `content`"
        )
    return value


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and {"role", "content"} <= turn.keys()


def _as_text(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """
    With the text of content that is a list of parts, and none where there is no
    content, as of a turn that calls tools: many templates would make what Python prints
    of either.

    :raises ValueError: if the content, or a part of it, is no text
    """
    parts = turn["content"]
    if parts is None:
        return turn | {"content": ""}
    if isinstance(parts, str):
        return turn
    if not isinstance(parts, list):
        raise ValueError(
            f"{where}: the content of a turn is {type(parts).__name__}, neither text "
            "nor a list of parts that are text"
        )
    told = [part.get("text") if isinstance(part, dict) else None for part in parts]
    texts = [text for text in told if isinstance(text, str)]
    if len(texts) < len(parts):
        raise ValueError(
            f"{where}: the content of a turn has parts that are no text (images, "
            "sounds, calls): only text is read. Leave such chats out"
        )
    return turn | {"content": "".join(texts)}
