"""Files that are there whole or not at all."""

import uuid
from contextlib import suppress
from pathlib import Path

__all__ = ["check_writable", "replace_file"]


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
    Make the directory, and a file in it.

    :param field: which field of the recipe names it
    :raises ValueError: naming the field and the reason
    """
    probe = Path(directory) / ".writable"
    try:
        replace_file(probe, b"0")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{field}={directory!r} cannot be written to ({error.strerror}): name "
            "another directory, or leave the field out"
        ) from error
