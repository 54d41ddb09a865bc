"""Files that are whole or not there."""

import os
from pathlib import Path

__all__ = ["check_file", "write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: no reader sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
