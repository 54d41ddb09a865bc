"""The directory of a pruned model."""

import json
import subprocess
from pathlib import Path

import pytest
from helpers.cli import files_in

from absorb_plugin.evaluation import output
from absorb_plugin.evaluation.output import (
    check_apart,
    check_output,
    check_result_file,
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


# --- the model is only read -------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "hub" / "model").mkdir(parents=True)
    (tmp_path / "hub" / "model" / "config.json").write_text("{}")
    return tmp_path / "hub" / "model"


def test_out_is_the_model_by_any_spelling(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(model, target_is_directory=True)
    (tmp_path / "chain").symlink_to("link", target_is_directory=True)
    spellings = [model, "hub/model", "hub/../hub/model/", "link", "chain", "./link/."]
    for out in map(Path, spellings):
        for given in map(str, spellings):
            with pytest.raises(ValueError, match="is the model itself"):
                check_apart(out, given)


def test_out_is_the_model_by_its_mount(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "mounted"
    other.mkdir()
    mount = ["mount", "--bind", str(model), str(other)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(ValueError, match="is the model itself"):
            check_apart(other, str(model))
    finally:
        subprocess.run(["umount", str(other)], check=True)


def test_out_holds_the_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lies in .*hub, which would be replaced"):
        check_apart(tmp_path / "hub", str(model))
    # the directory is elsewhere, its weights are not: so does the hub's cache
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "weights").symlink_to(model / "config.json")
    with pytest.raises(ValueError, match="linked/weights lies in"):
        check_apart(model, str(linked))


def test_out_of_a_model_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    found = str(cached / "config.json")
    monkeypatch.setattr(output, "try_to_load_from_cache", lambda *_: found)
    with pytest.raises(ValueError, match="is the model itself"):
        check_apart(cached, "org/name")
    check_apart(tmp_path / "other", "org/name")


def test_out_beside_or_in_the_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "hub" / "model-pruned").mkdir()
    check_apart(tmp_path / "hub" / "model-pruned", str(model))
    check_apart(tmp_path / "new", str(model))
    check_apart(model / "pruned", str(model))


# --- files of results -------------------------------------------------------------


def test_only_results_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    check_result_file(path)
    path.write_text(json.dumps({"model": "m", "sparsity": 0.5, "perplexity": 3.0}))
    check_result_file(path)
    (tmp_path / "figure.png").write_bytes(b"\x89PNG....")
    check_result_file(tmp_path / "figure.png")
    for content in ('{"model_type": "llama"}', "one\ntwo", "[1]"):
        path.write_text(content)
        with pytest.raises(FileExistsError, match="no result of an earlier run"):
            check_result_file(path)
    assert path.read_text() == "[1]"
