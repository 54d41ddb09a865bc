"""The directory of a pruned model: there whole, or not at all."""

import errno
import glob
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from loguru import logger

from absorb_plugin.files import json_object

__all__ = [
    "check_apart",
    "check_output",
    "check_result_file",
    "check_space",
    "kept_files",
    "staged_directory",
]


def check_output(out: Path, overwrite: bool) -> None:
    """
    :raises FileExistsError: if `out` is a file, holds files and `overwrite` is not set,
        or holds something that is not a model
    """
    out = out.expanduser().absolute()
    _warn_of_leftovers(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file, not a directory")
    # a run that was killed may have left a directory for its report
    if all(path.is_dir() for path in out.rglob("*")):
        return
    if not overwrite:
        raise FileExistsError(f"{out} is not empty: choose another, or overwrite=True")
    if not (out / "config.json").is_file():
        raise FileExistsError(
            f"{out} has files in it but no config.json, so it is no saved model: it "
            "will not be overwritten"
        )


def _warn_of_leftovers(out: Path) -> None:
    for left in sorted(out.parent.glob(f".{glob.escape(out.name)}.*.*")):
        if left.suffix in (".partial", ".old"):
            # not ours to delete: another run may be writing there
            logger.warning(
                f"{left} was left by a run that was killed, or is one that still runs: "
                + (
                    "an unfinished model, delete it"
                    if left.suffix == ".partial"
                    else f"the model that was in {out} before"
                )
            )


def check_apart(out: Path, model: str) -> None:
    """
    What is in `out` is replaced, and nothing of the model may be in there: not by
    another spelling, a link or a mount.

    :param model: directory or hub id
    :raises ValueError: if `out` is the model's directory, or files of it lie in `out`
    """
    out = out.expanduser().absolute()
    folder = Path(model).expanduser()
    if not out.exists():
        return
    if not folder.is_dir():
        config = try_to_load_from_cache(model, "config.json")
        if not isinstance(config, str):
            return
        folder = Path(config).parent
    if out.samefile(folder):
        raise ValueError(f"{out} is the model itself, and that is only read")
    for file in (folder, *folder.iterdir()):
        if any(out.samefile(parent) for parent in file.resolve().parents):
            raise ValueError(
                f"{file} lies in {out}, which would be replaced, and the model is only "
                "read: choose another directory"
            )


def check_result_file(path: Path) -> None:
    """
    To be asked before minutes are spent on what will be written to `path`: an existing
    file is replaced only if it is a result of `save_result` or a PNG.

    :raises FileExistsError: if it is something else
    """
    if not path.is_file() or path.stat().st_size == 0:
        return
    content = path.read_bytes()
    if content.startswith(b"\x89PNG"):
        return
    try:
        is_result = {"model", "sparsity"} <= json_object(content, str(path)).keys()
    except ValueError:
        is_result = False
    if not is_result:
        raise FileExistsError(
            f"{path} exists and is no result of an earlier run: it will not be "
            "overwritten. Choose another name"
        )


def check_space(out: Path, needed: int) -> None:
    """
    :param needed: bytes of the weights that will be written
    :raises OSError: if they will not fit where `out` is to be
    """
    folder = out.expanduser().absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 1e9:.2f} GB free, and the pruned model needs "
            f"{needed / 1e9:.2f}: make room, or choose another directory",
        )


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """
    A directory beside `out` that takes its place when the block ends well, and is
    removed when it does not: `out` is never half-written. What was in `out` is gone
    afterwards.

    :raises OSError: naming the remedy where the disk is full
    """
    out = out.expanduser().absolute()
    run = uuid.uuid4().hex[:8]
    staging = out.with_name(f".{out.name}.{run}.partial")
    old = out.with_name(f".{out.name}.{run}.old")
    try:
        staging.mkdir(parents=True)
        yield staging
        if out.exists():
            # The new one is complete by now, so a crash in here still loses nothing.
            out.rename(old)
        staging.rename(out)
    except Exception as error:
        if "No space left" not in str(error):  # the words of errno and of safetensors
            raise
        raise OSError(
            errno.ENOSPC,
            f"{out} was not written, the disk is full ({error}): make room, or choose "
            "another directory",
        ) from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for leftover in (staging, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def kept_files(out: Path, staging: Path) -> Iterator[None]:
    """
    Files that the run itself writes into `out`, as a report whose directory the recipe
    puts there, come along when `staging` takes the place of `out`.
    """
    out = out.expanduser().absolute()
    existed, before = out.exists(), _times(out)
    try:
        yield
        for path, time in _times(out).items():
            if before.get(path) != time:
                target = staging / path.relative_to(out)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
    finally:
        if not existed:
            shutil.rmtree(out, ignore_errors=True)


def _times(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }
