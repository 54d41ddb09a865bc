"""The directory of a pruned model: there whole, or not at all."""

import errno
import glob
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from loguru import logger
from tqdm import tqdm

from absorb_plugin.files import check_file, json_object

# What transformers, tokenizers, llm-compressor and we save a model as.
SAVED = (
    *("model.safetensors", "model-*-of-*.safetensors"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    *("*.safetensors.index.json", "*.bin.index.json"),
    *("*config.json", "tokenizer.json", "tokenizer.model*", "*tokens.json"),
    *("*tokens_map.json", "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "*.jinja", "chat_template.json"),
    *("normalizer.json", "recipe.yaml", "recipe_*.yaml", "absorb_recipe.yaml"),
    *("profile.json", "profile_[0-9]*.json", "profile.png", "profile_[0-9]*.png"),
    *("report.html", "report_[0-9]*.html"),
)

# In the words of errno and of safetensors: of a disk, of a quota, of a limit on a file.
FULL = ("No space left", "Disk quota exceeded", "File too large")

__all__ = [
    "check_apart",
    "check_inputs_apart",
    "check_output",
    "check_figure",
    "check_result_file",
    "check_space",
    "has_fields",
    "is_figure",
    "is_result",
    "staged_directory",
    "telling_it_is_complete",
]


def check_output(out: Path, overwrite: bool, model: str | None = None) -> None:
    """
    :param model: that is pruned, whose files of code llm-compressor copies
    :raises NotADirectoryError: if something above it is a file
    :raises FileExistsError: if `out` is a file, holds files and `overwrite` is not set,
        or holds something that is not a model
    :raises ValueError: if it is a mount point, which cannot be replaced, or its name
        is none that tokenizers can write to
    """
    out = out.expanduser().resolve()
    try:
        str(out).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{ascii(str(out))} is no name in UTF-8, to which a tokenizer could be "
            "saved: choose another directory (or, if it has letters beyond ASCII, a "
            "locale with UTF-8)"
        ) from error
    above = next((folder for folder in out.parents if folder.exists()), out)
    if not above.is_dir():
        raise NotADirectoryError(
            f"{out} cannot be made, for {above} is a file: choose another directory"
        )
    _warn_of_leftovers(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file, not a directory")
    if out.is_mount():
        raise ValueError(
            f"{out} is a mount point, and a directory is needed that can be replaced: "
            f"give one in it, as {out / 'model'}"
        )
    if Path.cwd().is_relative_to(out):
        raise ValueError(
            f"{out} is the working directory, or above it, and a directory is needed "
            f"that can be replaced: give one in it, as {out / 'model'}"
        )
    if not _holds_anything(out):
        return
    if not overwrite:
        raise FileExistsError(f"{out} is not empty: choose another, or overwrite=True")
    config = _config(out)
    if not config:
        raise FileExistsError(
            f"{out} has files in it but no config.json of a model, so it is no saved "
            "model: it will not be overwritten"
        )
    code = "auto_map" in config
    source = Path(model).expanduser() if model is not None else None
    if (other := _foreign(out, code, source)) is not None:
        raise FileExistsError(
            f"{out} holds {other.relative_to(out)} beside a model, which would be "
            "deleted with it: move it elsewhere, or choose another directory"
        )


def _holds_anything(out: Path) -> bool:
    """Files, or links to whatever, which may not be there now."""
    return any(path.is_symlink() or not path.is_dir() for path in out.rglob("*"))


def _config(folder: Path) -> Mapping[str, object]:
    """Of a model; empty where there is none."""
    config = folder / "config.json"
    if not config.is_file():
        return {}
    try:
        found = json_object(config.read_text(encoding="utf-8"), "")
    except (OSError, ValueError):
        return {}
    return found if found.keys() & {"model_type", "architectures"} else {}


def _foreign(
    folder: Path, code: bool = False, source: Path | None = None
) -> Path | None:
    """
    A file that no model is saved with, or a directory of such.

    :param code: whether the model comes with code of its own
    :param source: directory from which files of code may have been copied
    """
    patterns = (*SAVED, "*.py") if code else SAVED
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            return path
        if path.is_dir():
            # of reports and chat templates, which lie in no deeper one
            inner = [one for one in path.rglob("*") if not one.is_dir()]
            if any(one.parent != path for one in inner):
                return path
            if inner and path.name.startswith("."):
                return path
            if (other := _foreign(path)) is not None:
                return other
        elif not (
            any(fnmatch(path.name, pattern) for pattern in patterns)
            or (source is not None and _copied(path, source / path.name))
        ):
            return path
    return None


def _copied(path: Path, source: Path) -> bool:
    """Whether it is code of the same content."""
    code = path.suffix == ".py" and path.is_file() and source.is_file()
    return code and path.read_bytes() == source.read_bytes()


def _warn_of_leftovers(out: Path) -> None:
    kinds = {
        ".partial": "an unfinished model, delete it",
        ".complete": "a finished model that was not moved to its place",
        ".old": f"the model that was in {out} before",
    }
    for left in sorted(out.parent.glob(f".{glob.escape(_short(out.name))}.*.*")):
        if left.suffix in kinds:
            # not ours to delete: another run may be writing there
            logger.warning(
                f"{left} was left by a run that was killed, or is one that still runs: "
                + kinds[left.suffix]
            )


def _short(name: str) -> str:
    """As much of a name as leaves room for an ending, in the 255 bytes it may have."""
    return name.encode()[:200].decode(errors="ignore")


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
        if _lies_in(out, file):
            raise ValueError(
                f"{file} lies in {out}, which would be replaced, and the model is only "
                "read: choose another directory"
            )


def check_inputs_apart(out: Path, inputs: Mapping[str, Path | str | None]) -> None:
    """
    As `check_apart`, for whatever else is only read.

    :param inputs: option -> file or directory that it names; what is None, or is not
        there, is passed over
    :raises ValueError: if one is `out`, or lies in it
    """
    out = out.expanduser().absolute()
    for option, given in inputs.items():
        path = None if given is None else Path(given).expanduser()
        if path is None or not path.exists() or not out.exists():
            continue
        if out.samefile(path) or _lies_in(out, path):
            raise ValueError(
                f"{option} {given} lies in {out}, which would be replaced, and is only "
                "read: move it, or choose another directory"
            )


def _lies_in(out: Path, path: Path) -> bool:
    """The file itself, or the link that names it."""
    link = path.parent.resolve() / path.name
    return any(out.samefile(x) for x in (*link.parents, *path.resolve().parents))


def check_result_file(
    path: Path | None,
    option: str,
    is_own: Callable[[bytes], bool],
    inputs: Iterable[Path] = (),
) -> None:
    """
    To be asked before minutes are spent on what will be written to `path`: a file that
    is there is replaced only if the same option may have written it.

    :param path: None if nothing will be written
    :param option: that named it, for the message
    :param is_own: whether these are contents of such a file
    :param inputs: files that are only read
    :raises OSError: if it cannot be written, is something else, or one of `inputs`
    """
    if path is None:
        return
    check_file(path, option)
    if not path.is_file():
        return
    if any(file.exists() and path.samefile(file) for file in inputs):
        raise FileExistsError(f"{option} {path} is only read: choose another name")
    content = path.read_bytes()
    if content and not is_own(content):
        raise FileExistsError(
            f"{option} {path} exists and is no result of an earlier run: it will not "
            "be overwritten. Choose another name"
        )


def check_figure(path: Path | None, option: str) -> None:
    """
    To be asked before minutes are spent on what will be drawn.

    :param path: None if nothing will be
    :param option: that named it, for the message
    :raises OSError: as `check_result_file`
    :raises ValueError: if its name says that it is no PNG
    """
    check_result_file(path, option, is_figure)
    if path is not None and path.suffix.lower() not in ("", ".png"):
        raise ValueError(
            f"{option} {path}: the figure is a PNG, so let the name end in .png"
        )


def is_figure(content: bytes) -> bool:
    return content.startswith(b"\x89PNG")


def has_fields(*names: str, lacking: str = "") -> Callable[[bytes], bool]:
    """Whether something is a JSON object with these fields, and without another."""

    def test(content: bytes) -> bool:
        try:
            found = json_object(content, "").keys()
        except ValueError:
            return False
        return found >= set(names) and lacking not in found

    return test


# As `save_result` writes it; the last is of a file of ratios.
is_result = has_fields("model", "sparsity", lacking="linears")


def check_space(out: Path, needed: int) -> None:
    """
    :param needed: bytes of the weights that will be written
    :raises OSError: if they will not fit where `out` is to be
    """
    folder = out.expanduser().resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {tqdm.format_sizeof(free, 'B')} free, and the pruned model "
            f"needs {tqdm.format_sizeof(needed, 'B')}: make room, or choose another "
            "directory",
        )


@contextmanager
def staged_directory(out: Path, interchangeable: bool = False) -> Iterator[Path]:
    """
    A directory beside `out` that takes its place when the block ends well, and is
    removed when the block does not: `out` is never half-written. What was in `out` is
    gone afterwards.

    :param interchangeable: what another run has put into `out` in the meantime is as
        good, and stays
    :raises FileExistsError: if another run has, and it is not
    :raises KeyboardInterrupt: naming where the model is, if it comes when that is
        complete
    :raises OSError: naming the remedy where the disk is full, or where the finished
        directory lies if it could not be moved to `out`
    """
    out = out.expanduser().resolve()
    run = uuid.uuid4().hex[:8]
    staging = out.with_name(f".{_short(out.name)}.{run}.partial")
    before = _content(out)
    try:
        staging.mkdir(parents=True)
        yield staging
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, Exception) and any(one in str(error) for one in FULL):
            raise OSError(
                errno.ENOSPC,
                f"{out} was not written, the disk is full ({error}): make room, or "
                "choose another directory",
            ) from error
        raise
    # From here on it is complete, and not deleted whatever happens.
    complete = staging.with_suffix(".complete")
    places = () if interchangeable else (staging, complete, out)
    with telling_it_is_complete(*places):
        staging.rename(complete)
        if _content(out) == before:
            _take_place(complete, out)
            return
    if interchangeable:
        shutil.rmtree(complete)
        return
    raise FileExistsError(
        f"another run finished into {out} in the meantime, and what it wrote is "
        f"left there. This run's is complete too, in {complete}: move it where you "
        "want it"
    )


@contextmanager
def telling_it_is_complete(*places: Path) -> Iterator[None]:
    """
    For what is done with a model that is saved.

    :param places: where the model may be: it is in the first one that is there; none
        where it is no result of the command
    :raises KeyboardInterrupt: naming that place, where there was one without words
    :raises OSError: naming it where, as behind a full stdout, the system said no more
    """
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        if not places or isinstance(error, FileExistsError | BrokenPipeError):
            raise
        place = next((path for path in places if path.exists()), places[-1])
        told = f"the model is complete, in {place}"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(told) from error
        if str(place) in str(error):  # it says so itself
            raise
        raise OSError(error.errno, f"{error.strerror or error}; {told}") from error


def _content(out: Path) -> tuple[int, int] | bool:
    """Which model is in `out`; where there is none, whether there is anything else."""
    config = out / "config.json"
    if config.is_file():
        stat = config.stat()
        return stat.st_ino, stat.st_mtime_ns
    return _holds_anything(out)


def _take_place(complete: Path, out: Path) -> None:
    old = complete.with_suffix(".old")
    try:
        if out.exists():
            out.rename(old)
        complete.rename(out)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the model is complete, in {complete}, and could not be moved to {out} "
            f"({error.strerror}): move it where you want it",
        ) from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)
