"""Which files of a `report_dir` are a report's, and may be replaced or removed."""

import re
from collections.abc import Iterable
from pathlib import Path

from loguru import logger

from absorb_plugin.files import json_object

__all__ = ["check_replaceable", "remove_others", "report_files"]

# Of the second pruning modifier of a recipe and those after it.
FURTHER = re.compile(r"profile_([2-9]|[1-9]\d+)\.json")


def report_files(folder: Path, number: int) -> list[Path]:
    """
    :param number: of the report, from 0
    :return: its profile.json, then what is drawn from that
    """
    end = f"_{number + 1}" if number else ""
    names = (f"profile{end}.json", f"profile{end}.png", f"report{end}.html")
    return [folder / name for name in names]


def check_replaceable(directory: str, numbers: Iterable[int]) -> None:
    """
    :param numbers: of the reports that will be written there
    :raises ValueError: naming a file in the way that no report has left
    """
    folder = Path(directory)
    # one profile tells of all that is drawn, whose own may have been deleted
    is_ours = any(map(_is_profile, _profiles(folder)))
    for number in numbers:
        profile, *drawn = report_files(folder, number)
        foreign = [] if _is_profile(profile) else [profile]
        foreign += [] if is_ours else drawn
        if found := [path for path in foreign if path.exists()]:
            raise ValueError(
                f"report_dir={directory!r}: {found[0]} would be replaced, and nothing "
                f"tells that a report left it ({profile.name} with a schema_version "
                "would): move it away, or name another directory"
            )


def remove_others(directory: str) -> None:
    """
    Remove the second report and those after it, which are of an earlier run when the
    first is about to be written. What cannot be removed is a warning.
    """
    folder = Path(directory)
    for path in _profiles(folder):
        match = FURTHER.fullmatch(path.name)
        if match is None or not _is_profile(path):
            continue
        try:
            for file in report_files(folder, int(match[1]) - 1):
                file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(
                f"{path}, of an earlier run, could not be removed "
                f"({error.strerror or error}): remove it, or absorb compare refuses it"
            )


def _profiles(folder: Path) -> list[Path]:
    """Files of the names that profiles have."""
    return [
        path
        for path in folder.glob("profile*.json")
        if path.name == "profile.json" or FURTHER.fullmatch(path.name)
    ]


def _is_profile(path: Path) -> bool:
    try:
        return "schema_version" in json_object(path.read_bytes(), str(path))
    except (OSError, ValueError):
        return False
