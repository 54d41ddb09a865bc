"""
What is left behind when a run ends where it should not: nothing. Signals, a full disk,
plugins that raise, and data that is not fit to calibrate with.
"""

import ast
import gc
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import probes, runs, tiny
from helpers.cli import error_of, files_in
from llmcompressor.core import reset_session
from llmcompressor.modifiers.utils.hooks import HooksMixin
from transformers import AutoModelForCausalLM

import absorb_plugin
from absorb_plugin.allocators.base import Allocator, BaseAllocation
from absorb_plugin.evaluation.output import check_output, check_space, staged_directory
from absorb_plugin.forward import linears
from absorb_plugin.hookspecs import hookimpl
from absorb_plugin.plugins import PluginError, manager

NIGHTLY = "ABSORB_NIGHTLY" in os.environ  # `make fuzz`: every line, not 4 of them
PACKAGE = Path(absorb_plugin.__file__).parent


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1]]


# --- interrupted -----------------------------------------------------------------


def cleanup_lines(path: Path) -> set[int]:
    """Lines that put things back: an interrupt in there is a second Ctrl-C."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        last: list[ast.stmt] = []
        if isinstance(node, ast.Try):
            last = node.finalbody
        elif isinstance(node, ast.FunctionDef) and node.name in ("__exit__", "close"):
            last = node.body
        for statement in last:
            lines |= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    return lines


# All that is at work while the model runs.
FOLDERS = ("forward", "signals", "judges", "pruners")
FILES = {str(PACKAGE / "calibration.py")} | {
    str(path) for folder in FOLDERS for path in (PACKAGE / folder).glob("*.py")
}


class Tracer:
    """
    Counts the lines of our modules as they run; at one of them Ctrl-C comes.

    :param at: (file, line), None to count only
    """

    def __init__(self, at: tuple[str, int] | None = None) -> None:
        self.at = at
        self.seen: dict[tuple[str, int], int] = {}

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        return self.line if frame.f_code.co_filename in FILES else None

    def line(self, frame: FrameType, event: str, argument: object) -> Any:
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line":
            self.seen[place] = self.seen.get(place, 0) + 1
            if place == self.at:
                raise KeyboardInterrupt
        return self.line


@pytest.mark.parametrize("name", list(probes.PROBES))
def test_interrupted_at_any_line_leaves_nothing_behind(name: str) -> None:
    model = tiny.small(hidden_size=8)
    before, states = tiny.snapshot(model), random_states()
    batch = tiny.make_batch(3, tokens=6, padding="right")
    where = probes.place(model, batch)

    def traced(at: tuple[str, int] | None = None) -> Tracer:
        tracer = Tracer(at)
        previous = sys.gettrace()
        sys.settrace(tracer)
        try:
            probe = probes.PROBES[name].make(where)
            probes.run(model, [batch], probe)
            probe.result()
        finally:
            sys.settrace(previous)
        return tracer

    places = sorted(
        (path, line)
        for path, line in traced().seen
        if line not in cleanup_lines(Path(path))
    )
    assert len({path for path, _ in places}) >= 4 and len(places) > 60
    for place in places if NIGHTLY else random.Random(0).sample(places, 4):
        with pytest.raises(KeyboardInterrupt):
            traced(place)
        gc.collect()  # contexts that were just being entered
        tiny.assert_untouched(model, before)
        assert not HooksMixin._HOOKS_DISABLED, place
        assert torch.is_grad_enabled(), place
    np.testing.assert_equal(random_states(), states)


@pytest.mark.parametrize("what", ["KeyboardInterrupt", "OutOfMemoryError"])
def test_a_session_can_be_used_again(tmp_path: Path, what: str) -> None:
    """The run after one that failed gives what it would have given anyway."""
    expected, model = tiny.small(), tiny.small()
    runs.run(expected, [runs.absorption(), runs.pruner()], tmp_path)
    reset_session()
    before = tiny.snapshot(model)
    error = {
        "KeyboardInterrupt": KeyboardInterrupt,
        "OutOfMemoryError": torch.OutOfMemoryError,
    }[what]

    def fail(*_: Any) -> None:
        raise error

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(error):
        runs.run(model, [runs.absorption(), runs.pruner()], tmp_path)
    handle.remove()
    tiny.assert_untouched(model, before)
    reset_session()
    runs.run(model, [runs.absorption(), runs.pruner()], tmp_path)
    tiny.assert_same(tiny.snapshot(model), tiny.snapshot(expected))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_signals(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "prune_stage:\n"
        "  prune_modifiers:\n"
        "    AbsorptionAllocationModifier:\n"
        "      allocator: owl\n"
        "    WandaPruningModifier:\n"
        "      sparsity: 0.5\n"
        '      targets: ["Linear"]\n'
        '      ignore: ["re:.*lm_head"]\n'
    )
    dense = digests(model_dir)
    script = str(Path(__file__).with_name("helpers") / "signals.py")
    command = [sys.executable, script, str(model_dir), str(text_file), str(recipe)]
    done = subprocess.run([*command, str(tmp_path)], stdout=subprocess.PIPE, check=True)
    codes = json.loads(done.stdout.splitlines()[-1])
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert codes == {
        "whole": 0, "int": 130, "term": 130, "kill": -9, "save": -9, "resumed": 0,
        "one": 0, "two": 0, "three": 0,
    }, logs  # fmt: skip
    assert digests(model_dir) == dense
    for case in ("int", "term"):
        assert "interrupted: no result was written" in logs[case]
        assert "Traceback" not in logs[case]
    left = files_in(tmp_path) - {f"{name}.log" for name in logs}
    partial = {name for name in left if name.endswith(".partial")}
    pruned = {"whole", "kill", "one", "two", "three"}
    assert left - partial == {*pruned, "cache", "shared", "recipe.yaml"}
    # killed while a probe ran, and while it was saved: neither looks finished
    assert len(partial) == 2
    assert all(name.startswith(".kill.") for name in partial)
    assert logs["kill"].count("left by a run that was killed") == 3
    # the third run took all that the first two had measured, and saved the same model
    assert "Input statistics: taken from" in logs["kill"]
    # two at once, and one after them, with one cache
    for entry in (tmp_path / "shared").iterdir():
        assert entry.suffix == ".safetensors"
    assert "profile_cache:" not in logs["one"] + logs["two"] + logs["three"]
    assert "Held-out loss: taken from" in logs["three"]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    for name in pruned:
        other = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tiny.assert_same(tiny.snapshot(whole), tiny.snapshot(other))


# --- a full disk -----------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB: half of what the tiny model takes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def prune_arguments(model: Path, recipe: Path, text: Path, out: Path) -> list[Any]:
    return ["prune", model, "--recipe", recipe, "--text", text, "--out", out,
            "--samples", "4", "--seq-len", "16"]  # fmt: skip


def test_prune_on_a_small_disk_says_so_before_it_begins(
    small_disk: Path,
    model_dir: Path,
    text_file: Path,
    wanda_recipe: Path,
) -> None:
    arguments = prune_arguments(model_dir, wanda_recipe, text_file, small_disk / "out")
    message = error_of(*arguments)
    assert "kB free, and the pruned model needs" in message and "make room" in message
    assert files_in(small_disk) == set()


def test_a_disk_that_fills_up_while_the_model_is_saved(
    small_disk: Path,
    model_dir: Path,
    text_file: Path,
    wanda_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("absorb_plugin.evaluation.output.check_space", lambda *_: None)
    dense = digests(model_dir)
    arguments = prune_arguments(model_dir, wanda_recipe, text_file, small_disk / "out")
    message = error_of(*arguments)
    assert "the disk is full" in message and "make room" in message
    assert files_in(small_disk) == set()
    assert digests(model_dir) == dense


def test_full_disk_without_root(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words in (
        "No space left on device",
        "I/O error: No space left on device (28)",
        "I/O error: Disk quota exceeded (os error 122)",
        "I/O error: File too large (os error 27)",
    ):
        told = pytest.raises(OSError, match="out was not written.*make room")
        with told, staged_directory(out) as staging:
            (staging / "half").write_text("written")
            raise RuntimeError(words)
    assert files_in(tmp_path) == set()


def test_space_is_judged_by_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    check_space(tmp_path / "a" / "b", 1000)
    with pytest.raises(OSError, match="make room"):
        check_space(tmp_path / "a" / "b", 1001)


def test_an_old_model_survives_a_rename_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    original = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.suffix == ".complete":
            raise KeyboardInterrupt
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt), staged_directory(out) as staging:
        (staging / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "old"
    (complete,) = tmp_path.glob(".out.*")
    assert (complete / "config.json").read_text() == "new"


def test_what_a_killed_run_left_is_named(tmp_path: Path, logs: list[str]) -> None:
    (tmp_path / ".out.0123abcd.partial").mkdir()
    (tmp_path / ".out.0123abcd.complete").mkdir()
    (tmp_path / ".out.0123abcd.old").mkdir()
    (tmp_path / ".other.0123abcd.partial").mkdir()
    check_output(tmp_path / "out", False)
    assert len(logs) == 3
    assert any(".partial was left" in x and "delete it" in x for x in logs)
    assert any(".complete was left" in x and "a finished" in x for x in logs)
    assert any(".old was left" in x and "was in" in x for x in logs)


def test_a_report_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, logs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("absorb_plugin.report.write.replace_file", full)
    model, expected = tiny.small(), tiny.small()
    for pruned, folder in ((model, tmp_path / "report"), (expected, None)):
        recipe = [runs.absorption(report_dir=folder), runs.pruner()]
        runs.run(pruned, recipe, tmp_path)
        reset_session()
    tiny.assert_same(tiny.snapshot(model), tiny.snapshot(expected))
    told = [line for line in logs if "could not be written (No space left" in line]
    # page, profile and figure, of the allocation and of what was realised
    assert len(told) == 6 and all("Make room" in line for line in told)


# --- weights and plugins ---------------------------------------------------------

FIELDS: dict[str, dict[str, Any]] = {
    "gradient": {"signal": "gradient"},
    "pruner": {"signal": "pruner", "kind": "sparsegpt"},
    "response": {"signal": "response"},
    "noise": {"signal": "noise"},
    "auto": {"strength": "auto"},
    "alpha": {"allocator": "alpha_pruning", "strength": 0},
    "dlp": {"allocator": "dlp", "strength": 0},
}
PLACES = ["model.embed_tokens", "model.layers.1.mlp.up_proj", "model.norm", "lm_head"]


INSIDE = "check the (weights|checkpoint) and the dtype"
AFTER = "check the weights after the blocks"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("case", FIELDS)
def test_weights_that_are_not_finite(case: str, where: str, value: float) -> None:
    model = tiny.small()
    model.get_submodule(where).weight.data.view(-1)[3:] = value
    before = tiny.snapshot(model)
    read = {"alpha": PLACES[1:2], "noise": PLACES[:2], "dlp": PLACES[:2]}
    if where in read.get(case, PLACES):
        message = INSIDE if where in PLACES[:2] else AFTER
        with pytest.raises(ValueError, match=message):
            runs.allocate(model, **FIELDS[case])
    else:  # what it never runs does not change what it finds
        sound = runs.allocate(tiny.small(), **FIELDS[case])
        found = runs.allocate(model, **FIELDS[case])
        np.testing.assert_array_equal(found.sparsity, sound.sparsity)
    after = tiny.snapshot(model)
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.int32), after[name].view(torch.int32))


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
def test_what_overflows_when_pruned_is_not_blamed_on_the_text(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense model that is finite, and infinity where something is pruned."""
    apply = linears.apply_linear
    monkeypatch.setattr(
        linears, "apply_linear", lambda *args: apply(*args).fill_(torch.inf)
    )
    with pytest.raises(ValueError, match="under the weights that pruning leaves"):
        runs.allocate(tiny.small(), kind=kind, signal="auto", strength=0.1)


class Raising(Allocator):
    name = "raising"

    def allocate(self, groups: Any, sparsity: float) -> BaseAllocation:
        raise ZeroDivisionError("in the plugin")


class RaisingPlugin:
    """An allocator that raises, and an observer that does."""

    @hookimpl
    def register_allocators(self) -> list[type[Allocator]]:
        return [Raising]

    @hookimpl
    def allocation_finished(self, profile: dict[str, Any]) -> None:
        raise ZeroDivisionError("in the observer")


@pytest.mark.parametrize(
    "allocator, message",
    [
        ("raising", r"allocator 'raising' of plugin 'broken' .*in the plugin"),
        ("owl", r"allocation_finished.*in the observer.*'broken'.*uninstall"),
    ],
)
def test_plugins_that_raise(tmp_path: Path, allocator: str, message: str) -> None:
    model = tiny.small()
    before = tiny.snapshot(model)
    manager().register(RaisingPlugin(), name="broken")
    try:
        with pytest.raises(PluginError, match=message):
            recipe = [runs.absorption(allocator=allocator), runs.pruner()]
            runs.run(model, recipe, tmp_path)
    finally:
        manager().unregister(name="broken")
    tiny.assert_same(tiny.snapshot(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- calibration data ------------------------------------------------------------

SIGNALS: dict[str, dict[str, Any]] = {
    "gradient": {"signal": "gradient"},
    "pruner": {"signal": "pruner", "kind": "sparsegpt"},
    "response": {"signal": "response"},
    "noise": {"signal": "noise"},
    "tuned": {"strength": "auto", "signal": "gradient"},
    "tuned noise": {"strength": "auto", "signal": "noise"},
    "confirmed": {"strength": "auto", "signal": "gradient", "kind": "sparsegpt"},
}


def met(allocation: Any) -> None:
    assert allocation.achieved() == pytest.approx(0.5, abs=1e-6)
    assert np.isfinite(list(allocation.linear_sparsities().values())).all()


def padded(rows: list[int], tokens: int = 12, side: str = "left") -> dict:
    """Samples with so many tokens each, the rest padding."""
    batch = tiny.make_batch(len(rows), tokens)
    for row, kept in enumerate(rows):
        unused = slice(0, tokens - kept) if side == "left" else slice(kept, tokens)
        batch["input_ids"][row, unused] = 0
        batch["attention_mask"][row, unused] = 0
    return batch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", SIGNALS)
def test_samples_that_are_mostly_or_all_padding(
    case: str, side: str, logs: list[str]
) -> None:
    """Those of padding alone are left out, as if they were not there."""
    rows = [0, 12, 2, 3, 0, 5]
    found = runs.allocate(tiny.small(), [padded(rows, side=side)], **SIGNALS[case])
    met(found)
    batch = padded(rows, side=side)
    kept = {name: tensor[[1, 2, 3, 5]] for name, tensor in batch.items()}
    expected = runs.allocate(tiny.small(), [kept], **SIGNALS[case])
    np.testing.assert_array_equal(found.sparsity, expected.sparsity)
    (told,) = [line for line in logs if "left out" in line]
    assert told.startswith("WARNING 2 of 6 calibration samples")


def test_pruners_prune_by_padding_and_that_is_told(
    tmp_path: Path, warnings: list[str]
) -> None:
    rows = {
        "input_ids": [[5] * 16] * 6,
        "attention_mask": [[1] * 12 + [0] * 4] * 6,
    }
    data = Dataset.from_dict(rows)
    runs.run(tiny.small(), [runs.absorption(), runs.pruner()], tmp_path, dataset=data)
    (told,) = [line for line in warnings if "is padding" in line]
    assert told.startswith("25% of the calibration set") and "truncation" in told
    reset_session()
    bounded = runs.absorption(max_loss_increase=0.1, strength="auto")
    with pytest.raises(ValueError, match="max_loss_increase=0.1: 25% .* is padding"):
        runs.run(tiny.small(), [bounded, runs.pruner()], tmp_path, dataset=data)


@pytest.mark.parametrize("case", SIGNALS)
def test_padding_alone(case: str) -> None:
    with pytest.raises(ValueError, match="calibration set has no token.*needs"):
        runs.allocate(tiny.small(), [padded([0, 0])], **SIGNALS[case])


@pytest.mark.parametrize("case", SIGNALS)
def test_one_token(case: str) -> None:
    model, batch = tiny.small(), tiny.make_batch(3, tokens=1)
    if case == "noise":  # the only one that needs no loss
        met(runs.allocate(model, [batch], **SIGNALS[case]))
        return
    told = pytest.raises(ValueError, match="no token to predict.*longer samples")
    with tiny.counted({"model": model.model}) as passes, told:
        runs.allocate(model, [batch], **SIGNALS[case])
    assert passes == {"model": 0}


@pytest.mark.parametrize("case", SIGNALS)
def test_constant_text(case: str) -> None:
    batch = tiny.make_batch(4)
    batch["input_ids"][:] = 7
    met(runs.allocate(tiny.small(), [batch], **SIGNALS[case]))


@pytest.mark.parametrize("case", SIGNALS)
def test_the_random_state_is_as_it_was(case: str) -> None:
    states = random_states()
    runs.allocate(tiny.small(), **SIGNALS[case])
    # made with a seed of its own
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model, states = tiny.small(), random_states()
    runs.allocate(model, **SIGNALS[case])
    np.testing.assert_equal(random_states(), states)


def failing_loader(error: type[BaseException]) -> Callable[[], Iterator[dict]]:
    def batches() -> Iterator[dict]:
        yield tiny.make_batch(2)
        torch.rand(3)
        raise error("in the loader")

    return batches


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_loader_that_raises(error: type[BaseException]) -> None:
    from absorb_plugin.calibration import read_batches

    class Loader:
        generator = torch.Generator().manual_seed(3)

        def __iter__(self) -> Iterator[dict]:
            torch.rand(2, generator=self.generator)
            return failing_loader(error)()

    before, own = torch.get_rng_state(), Loader.generator.get_state()
    with pytest.raises(error, match="in the loader"):
        read_batches(Loader())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(Loader.generator.get_state(), own)
