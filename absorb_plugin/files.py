"""Files that are there whole or not at all, and what JSON does not say by itself."""

import json
import math
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

__all__ = [
    "check_file",
    "check_letters",
    "check_pointer",
    "check_writable",
    "json_numbers",
    "json_object",
    "replace_file",
]


LFS_POINTER = b"version https://git-lfs"


def check_pointer(path: Path) -> None:
    """:raises ValueError: if it is a pointer of Git LFS"""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path} is a pointer of Git LFS, not the file itself: run "
                "`git lfs pull` in the repository"
            )


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """
    :param where: file, and line if it is one of several, for the message
    :raises ValueError: if `text` is not JSON, not UTF-8, or no object
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: JSON that is nested too deeply to read") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: not a JSON object")
    return content


def check_letters(value: object, where: str) -> None:
    """
    JSON may hold half of a letter beyond 16 bits ("\\ud83d"), which is no text.

    :param value: a text, or lists and objects with texts in them
    :param where: file, row and field, for the message
    :raises ValueError: if a text cannot be written as UTF-8
    """
    left = [value]  # not by recursion: JSON may be nested deeply
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            left += one
        elif isinstance(one, str):
            _check_letters_of(one, where)


def _check_letters_of(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {text[error.start]!r} at character {error.start + 1} is half of "
            "a letter (a lone surrogate), as where an emoji was cut in two: take it out"
        ) from error


def json_numbers(values: Iterable[float]) -> list[float | None]:
    """JSON has no NaN and no infinity: None stands for what was not measured."""
    return [float(value) if math.isfinite(value) else None for value in values]


def replace_file(path: Path, content: bytes) -> None:
    """
    Write under a temporary name, then rename: no reader sees half a file, and of two
    writers the later one wins. Missing directories are made, links are followed.

    :raises OSError: if it cannot be written, or is no regular file; `path` is then as
        it was
    """
    path = path.resolve()
    _check_regular(path, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _check_regular(path: Path, name: str) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a directory: name a file in it")
    if path.exists() and not path.is_file():
        raise FileExistsError(
            f"{name} is a device or a pipe, which cannot be replaced: name a file"
        )


def check_writable(field: str, directory: str) -> None:
    """
    Make the directory, and a nameless file in it that is gone again.

    :param field: which field of the recipe names it
    :raises ValueError: naming the field and the reason
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(
            f"{field}={directory!r} cannot be written to ({error.strerror}): name "
            "another directory, or leave the field out"
        ) from error


def check_file(path: Path, option: str) -> None:
    """
    To be asked before minutes are spent on what will be written to `path`.

    :param option: that named it, for the message
    :raises OSError: if `path` is a directory, a device or a pipe, or its parent is
        missing, no directory, or cannot be written to
    """
    name, parent = f"{option} {path}", path.resolve().parent
    _check_regular(path, name)
    if not parent.is_dir():
        raise NotADirectoryError(f"{name}: {parent} is no directory")
    try:
        with TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"{name}: {parent} cannot be written to ({error.strerror}): name another",
        ) from error
