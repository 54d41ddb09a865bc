"""The directory of a pruned model."""

from pathlib import Path

import pytest
from helpers.cli import files_in

from absorb_plugin.evaluation.output import (
    check_output,
    kept_files,
    staged_directory,
)


def test_failed_run_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), staged_directory(out) as staging:
        (staging / "half").write_text("written")
        raise RuntimeError
    assert files_in(tmp_path) == set()


def test_finished_run_replaces_the_old_one(tmp_path):
    out = tmp_path / "sub" / "out"
    for content in ("old", "new"):
        with staged_directory(out) as staging:
            (staging / content).write_text("whole")
    assert files_in(tmp_path / "sub") == {"out"}
    assert files_in(out) == {"new"}


def test_a_run_that_fails_leaves_no_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(RuntimeError),
        staged_directory(out) as staging,
        kept_files(out, staging),
    ):
        (out / "report").mkdir(parents=True)
        (out / "report" / "profile.json").write_text("{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_empty_directories_are_no_files(tmp_path: Path) -> None:
    """What a run leaves that is killed after it made room for its report."""
    (tmp_path / "out" / "report").mkdir(parents=True)
    check_output(tmp_path / "out", overwrite=False)
    (tmp_path / "out" / "report" / "profile.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is not empty"):
        check_output(tmp_path / "out", overwrite=False)
