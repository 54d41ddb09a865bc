"""The directory of a pruned model."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cli import files_in

from absorb_plugin.evaluation import output
from absorb_plugin.evaluation.output import (
    check_apart,
    check_inputs_apart,
    check_output,
    check_result_file,
    is_figure,
    is_result,
    staged_directory,
    telling_it_is_complete,
)
from absorb_plugin.evaluation.recipes import is_native_recipe, native_recipe


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


MODEL = '{"model_type": "llama"}'


@pytest.mark.parametrize(
    "other",
    [
        *("thesis.md", "data/rows.csv", ".git/HEAD", "train.py", "runs/1/optimizer.pt"),
        *("train.bin", "optimizer.bin", "adapter_model.safetensors"),
        *("vocab_counts.csv", "tokenizer_corpus.txt", "report_to_boss.html"),
        "profile_new.json",
    ],
)
def test_what_is_no_model_is_not_deleted_with_one(other: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / other).parent.mkdir(parents=True)
    (out / "config.json").write_text(MODEL)
    check_output(out, overwrite=True)
    (out / other).write_text("of the user")
    with pytest.raises(FileExistsError, match=rf"holds {other.split('/')[0]}"):
        check_output(out, overwrite=True)
    assert (out / other).read_text() == "of the user"


@pytest.mark.parametrize("kind", ["directory", "dangling", "pipe"])
def test_a_directory_of_links_is_not_empty(kind: str, tmp_path: Path) -> None:
    out, inner = tmp_path / "out", tmp_path / "out" / "inner"
    inner.mkdir(parents=True)
    check_output(out, overwrite=False)
    if kind == "pipe":
        os.mkfifo(inner / "pipe")
    else:
        (tmp_path / "directory").mkdir()
        (inner / "link").symlink_to(tmp_path / kind)
    with pytest.raises(FileExistsError, match="is not empty"):
        check_output(out, overwrite=False)
    with pytest.raises(FileExistsError, match="no config.json of a model"):
        check_output(out, overwrite=True)


@pytest.mark.parametrize("config", ['{"lr": 0.1}', "[]", "not JSON"])
def test_another_kind_of_config_is_no_model(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(FileExistsError, match="no config.json of a model"):
        check_output(tmp_path, overwrite=True)


def test_what_a_model_is_saved_with_is_replaced(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    names += ["tokenizer.model", "vocab.json", "vocab.txt", "added_tokens.json"]
    names += ["pytorch_model.bin", "report/profile_2.png", "model.safetensors"]
    names += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    names += ["generation_config.json", "chat_template.jinja", "absorb_recipe.yaml"]
    names += ["recipe.yaml", "report/profile.json", "report/report_2.html", "a.py"]
    (tmp_path / "report").mkdir()
    for name in names:
        (tmp_path / name).write_text("")
    code = '{"architectures": ["A"], "auto_map": {}}'
    (tmp_path / "config.json").write_text(code)
    check_output(tmp_path, overwrite=True)
    (tmp_path / "config.json").write_text(MODEL)
    with pytest.raises(FileExistsError, match="holds a.py"):
        check_output(tmp_path, overwrite=True)


def test_code_that_was_copied_from_the_model_is_replaced(tmp_path: Path) -> None:
    """As llm-compressor copies it, whether the model's config names it or not."""
    out, model = tmp_path / "out", tmp_path / "model"
    for folder in (out, model):
        folder.mkdir()
        (folder / "config.json").write_text(MODEL)
        (folder / "a.py").write_text("A = 1")
    check_output(out, overwrite=True, model=str(model))
    with pytest.raises(FileExistsError, match="holds a.py"):
        check_output(out, overwrite=True, model="org/name")
    (model / "a.py").write_text("A = 2")
    with pytest.raises(FileExistsError, match="holds a.py"):
        check_output(out, overwrite=True, model=str(model))


def test_a_long_name_can_be_staged(tmp_path: Path) -> None:
    out = tmp_path / ("é" * 127)
    with staged_directory(out) as staging:
        (staging / "new").write_text("whole")
    assert files_in(out) == {"new"}


def test_where_one_stands_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for out in (Path("."), inner, tmp_path / "a"):
        with pytest.raises(ValueError, match="is the working directory, or above it"):
            check_output(out, overwrite=False)
    check_output(inner / "model", overwrite=False)


def test_a_full_stdout_says_where_the_model_is(tmp_path: Path) -> None:
    tmp_path.joinpath("model").mkdir()
    place = tmp_path / "model"
    told = rf"No space left.*; the model is complete, in {place}"
    with pytest.raises(OSError, match=told), telling_it_is_complete(place):
        raise OSError(errno.ENOSPC, "No space left on device")
    for error in (BrokenPipeError(), FileExistsError("there")):
        with pytest.raises(type(error)) as caught, telling_it_is_complete(place):
            raise error
        assert "complete" not in str(caught.value)


def save(content: str, staging: Path) -> None:
    (staging / "config.json").write_text(content)


def test_a_run_that_another_overtook_leaves_both(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for before in ("absent", "overwritten"):
        with (
            pytest.raises(FileExistsError, match="another run finished into") as told,
            staged_directory(out) as staging,
        ):
            save("mine", staging)
            with staged_directory(out) as other:
                save(f"theirs, {before}", other)
        assert (out / "config.json").read_text() == f"theirs, {before}"
        (complete,) = tmp_path.glob(".out.*")
        assert str(complete) in str(told.value)
        assert (complete / "config.json").read_text() == "mine"
        shutil.rmtree(complete)


@pytest.mark.parametrize(
    "when", [(Path, "rename"), (output, "_take_place"), (shutil, "rmtree")]
)
def test_an_interrupt_when_the_model_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: tuple
) -> None:
    """Before it is in its place, and while the old one is removed."""
    out = tmp_path / "out"
    with staged_directory(out) as staging:
        save("old", staging)

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt, match="the model is complete, in ") as told,
        staged_directory(out) as staging,
    ):
        save("new", staging)
        monkeypatch.setattr(*when, interrupt)
    place = Path(str(told.value).removeprefix("the model is complete, in "))
    assert (place / "config.json").read_text() == "new"
    assert (place == out) == (when == (shutil, "rmtree"))


def test_a_run_that_fails_leaves_what_another_saved(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), staged_directory(out) as staging:
        with staged_directory(out) as other:
            save("theirs", other)
        save("mine", staging)
        raise KeyboardInterrupt
    assert files_in(tmp_path) == {"out"} and files_in(out) == {"config.json"}


def test_files_that_came_in_the_meantime_are_no_part_of_the_model(
    tmp_path: Path,
) -> None:
    """An evaluation of the old model; into no model nothing is overwritten."""
    out = tmp_path / "out"
    with staged_directory(out) as staging:
        save("old", staging)
    with staged_directory(out) as staging:
        (out / "eval.json").write_text("of the old model")
        save("new", staging)
    assert files_in(out) == {"config.json"}
    other = tmp_path / "other"
    with pytest.raises(FileExistsError), staged_directory(other) as staging:
        other.mkdir()
        (other / "notes.txt").write_text("mine")
        save("new", staging)
    assert files_in(other) == {"notes.txt"}


def test_the_first_of_two_that_are_alike_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_directory(out, interchangeable=True) as staging:
        save("second", staging)
        with staged_directory(out, interchangeable=True) as other:
            save("first", other)
    assert (out / "config.json").read_text() == "first"
    assert files_in(tmp_path) == {"out"}


def test_a_link_to_another_disk_stays(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk / "model")
    for content in ("old", "new"):
        check_output(tmp_path / "out", overwrite=True)
        with staged_directory(tmp_path / "out") as staging:
            assert staging.parent == disk
            save(MODEL, staging)
            (staging / f"recipe_{content}.yaml").write_text(content)
    assert (tmp_path / "out").is_symlink() and files_in(tmp_path) == {"disk", "out"}
    assert files_in(disk / "model") == {"config.json", "recipe_new.yaml"}
    assert files_in(disk) == {"model"}


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(ValueError, match="mount point.*give one in it, as /model"):
        check_output(Path("/"), overwrite=True)


def test_a_model_that_cannot_be_moved_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with staged_directory(out) as staging:
        save("old", staging)
    original = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return original(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    with (
        pytest.raises(OSError, match="is complete, in .*busy.: move it") as told,
        staged_directory(out) as staging,
    ):
        save("new", staging)
    (complete,) = tmp_path.glob(".out.*")
    assert str(complete) in str(told.value)
    assert (complete / "config.json").read_text() == "new"
    assert (out / "config.json").read_text() == "old"


@pytest.mark.parametrize("below", ["model", "a/b/model"])
def test_nothing_can_be_made_below_a_file(tmp_path: Path, below: str) -> None:
    file = tmp_path / "t.txt"
    file.write_text("a text")
    told = f"{file / below} cannot be made, for {file} is a file"
    with pytest.raises(NotADirectoryError, match=told):
        check_output(file / below, overwrite=False)


def test_empty_directories_are_no_files(tmp_path: Path) -> None:
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


def test_what_is_read_beside_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    (model / "t.txt").write_text("a text")
    (tmp_path / "t.txt").write_text("a text")
    (model / "link").symlink_to(tmp_path / "t.txt")
    (tmp_path / "away").symlink_to(model / "t.txt")
    for given in ("t.txt", model / "t.txt", "link", tmp_path / "away", model):
        with pytest.raises(ValueError, match=r"^--text .* lies in .*: move it, or"):
            check_inputs_apart(model, {"--recipe": None, "--text": given})
    elsewhere = {"--text": "../../t.txt", "--recipe": tmp_path / "none"}
    check_inputs_apart(model, {**elsewhere, "--dataset": "org/name"})
    check_inputs_apart(tmp_path / "new", {"--text": "t.txt"})


# --- files of results -------------------------------------------------------------


RECIPES = Path(__file__).parents[2] / "recipes"
RATIOS = ['{"model": 1}', "[1]", '{"model": "m", "sparsity": 0.5, "linears": {}}']
OWN: dict[str, tuple[Callable[[bytes], bool], str, list[str]]] = {
    "result": (is_result, '{"model": "m", "sparsity": 0.5}', RATIOS),
    "figure": (is_figure, "\x89PNG", ['{"model": "m", "sparsity": 0.5}', "one\ntwo"]),
    "recipe": (
        is_native_recipe,
        native_recipe({"layers.0.q_proj": 0.5, "layers.0.k_proj": 0.4}, "wanda"),
        ["one\ntwo", "a: [1", "\0", "prune_stage: {prune_modifiers: {}}"]
        + [path.read_text() for path in sorted(RECIPES.glob("*.yaml"))],
    ),
}


@pytest.mark.parametrize("kind", OWN)
def test_only_results_are_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    is_own, own, others = OWN[kind]
    check_result_file(None, "--out", is_own)
    check_result_file(path, "--out", is_own)
    for content in (own, ""):
        path.write_text(content, encoding="latin-1")
        check_result_file(path, "--out", is_own)
    for content in others:
        path.write_text(content)
        with pytest.raises(FileExistsError, match="--out .* no result of an earlier r"):
            check_result_file(path, "--out", is_own)
        assert path.read_text() == content


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    path, link = tmp_path / "eval.json", tmp_path / "link"
    path.write_text('{"model": "m", "sparsity": 0.5}')
    link.symlink_to(path)
    check_result_file(link, "--out", is_result, [tmp_path / "other"])
    with pytest.raises(FileExistsError, match="--out .*link is only read"):
        check_result_file(link, "--out", is_result, [path])


def test_a_name_that_no_tokenizer_could_be_saved_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no name in UTF-8.*another directory"):
        check_output(tmp_path / "out\udcff", overwrite=False)
