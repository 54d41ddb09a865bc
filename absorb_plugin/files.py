"""Files that are there whole or not at all, and what JSON does not say by itself."""

import json
import math
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

__all__ = [
    "check_file",
    "check_writable",
    "json_numbers",
    "json_object",
    "replace_file",
]


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """
    :param where: file, and line if it is one of several, for the message
    :raises ValueError: if `text` is not JSON, not UTF-8, or no object
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: not a JSON object")
    return content


def json_numbers(values: Iterable[float]) -> list[float | None]:
    """JSON has no NaN and no infinity: None stands for what was not measured."""
    return [float(value) if math.isfinite(value) else None for value in values]


def replace_file(path: Path, content: bytes) -> None:
    """
    Write under a temporary name, then rename: no reader sees half a file, and of two
    writers the later one wins. Missing directories are made.

    :raises OSError: if it cannot be written; `path` is then as it was
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


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
    :raises IsADirectoryError: if `path` is a directory
    :raises NotADirectoryError: if its parent is missing or no directory
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a directory: name a file in it")
    if not path.absolute().parent.is_dir():
        raise NotADirectoryError(f"{option} {path}: {path.parent} is no directory")
