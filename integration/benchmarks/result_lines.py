"""
Lines of JSON that quality.py and quality_target.py append, one per run: what a run is
known by, so that another one is neither taken for it nor set beside it in a table.
"""

import hashlib
import json
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

__all__ = [
    "append",
    "code_version",
    "described",
    "digest",
    "fixed_fields",
    "grouped",
    "other_code",
    "read_lines",
    "settings_of",
    "to_run",
]

# What all runs of a table have in common, beside the model and what judges them.
SETTINGS = ("text", "text_digest", "samples", "seq_len", "dtype", "windows")


def digest(path: Path) -> str:
    """Of a file's bytes, twelve hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@cache
def code_version() -> str:
    """
    The commit at the first call, with `-dirty` where files differ from it; outside of a
    checkout the version of the package.
    """
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return version("absorb-plugin")
    return found.stdout.strip()


def fixed_fields(options: Namespace) -> dict:
    """
    Of all runs of one command.

    :param options: with `model`, `text`, `samples`, `seq_len`, `dtype` and `windows`
    """
    return {
        "model": Path(options.model).name,
        "text": options.text.name,
        "text_digest": digest(options.text),
        "samples": options.samples,
        "seq_len": options.seq_len,
        "dtype": options.dtype,
        "windows": options.windows,
    }


def settings_of(line: dict) -> dict:
    """None for what lines of earlier versions do not have."""
    return {name: line.get(name) for name in SETTINGS}


def described(settings: dict) -> str:
    """For the heading of a table."""
    content = settings["text_digest"]
    text = settings["text"] + (f" ({content})" if content else "")
    size = f"{settings['samples']} × {settings['seq_len']} tokens"
    return f"{size} of {text}, {settings['dtype']}"


def grouped(
    lines: Iterable[dict], key: Callable[[dict], dict]
) -> list[tuple[dict, list[dict]]]:
    """Lines of equal keys together, in the order of their first ones."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault(tuple(key(line).items()), []).append(line)
    return [(dict(found), own) for found, own in groups.items()]


def read_lines(paths: Sequence[Path]) -> list[dict]:
    """Of all files that exist."""
    return [
        json.loads(line)
        for path in paths
        if path.exists()
        for line in path.read_text().splitlines()
    ]


def to_run(
    cells: Sequence[dict], done: Sequence[dict]
) -> tuple[list[dict], list[dict]]:
    """
    Cells that have no line, and the last line of each of the others.

    :param cells: fields that a line must have
    """
    missing, kept = [], []
    for cell in cells:
        found = [line for line in done if cell.items() <= line.items()]
        if found:
            kept.append(found[-1])
        else:
            missing.append(cell)
    return missing, kept


def append(line: dict, path: Path) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def other_code(kept: Sequence[dict], current: str) -> str:
    """What to say of runs that are not repeated and are of other code; may be empty."""
    others = [line.get("commit") or "unknown" for line in kept]
    others = [commit for commit in others if commit != current]
    if not others:
        return ""
    names = ", ".join(dict.fromkeys(others))
    return f"{len(others)} runs are kept of other code: {names}; this is {current}"
