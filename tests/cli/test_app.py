"""What all commands share."""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cli import absorb, error_of

from absorb_plugin.cli.frame import command, one_line, show


@pytest.mark.parametrize("name", ["prune", "eval", "demo"])
def test_help(name):
    result = absorb(name, "--help")
    assert result.exit_code == 0
    assert "--json" in re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)


def test_debug_shows_the_traceback(model_dir):
    result = absorb("eval", model_dir, "--text", "missing.txt", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("level", ["OFF", "verbose"])
def test_a_level_of_logs_that_is_none(level, monkeypatch):
    monkeypatch.setenv("LLM_COMPRESSOR_LOG_LEVEL", level)
    line = error_of("allocators")
    assert f"LLM_COMPRESSOR_LOG_LEVEL={level.upper()} is set" in line
    assert "CRITICAL, or unset it" in line


@pytest.mark.parametrize("level", ["", "error", "METRIC"])
def test_levels_of_logs(level, monkeypatch):
    monkeypatch.setenv("LLM_COMPRESSOR_LOG_LEVEL", level)
    assert absorb("allocators").exit_code == 0


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_has_gone(options):
    """As `| head -1` does: nothing is said of it."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "absorb_plugin.cli", "allocators", *options]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "replace"])
@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_letters_that_stdout_has_not(encoding, errors, monkeypatch):
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding=encoding, errors=errors)
    monkeypatch.setattr("sys.stdout", stdout)
    with command(debug=False) as out:
        show(out, {"eta": 0.1}, as_json=False, line="η={eta}")
    eta = "η" if encoding == "utf-8" else "?"
    assert raw.getvalue().decode(encoding) == f"{eta}=0.1\n"


def test_a_name_of_a_file_that_is_no_utf_8(monkeypatch):
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding="UTF8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdout", stdout)
    with command(debug=False) as out:
        show(out, {"out": os.fsdecode(b"/caf\xe9")}, as_json=False, line="{out}")
    assert raw.getvalue() == b"/caf\xe9\n"


@pytest.mark.parametrize("ignored", [False, True])
def test_a_connection_that_is_lost(ignored, monkeypatch):
    """Unless nohup has it go on."""

    def lose(*arguments: object) -> None:
        signal.raise_signal(signal.SIGHUP)

    was = signal.SIG_IGN if ignored else signal.SIG_DFL
    before = signal.signal(signal.SIGHUP, was)
    monkeypatch.setattr("absorb_plugin.cli.frame.route_logs", lose)
    try:
        assert absorb("allocators").exit_code == (0 if ignored else 130)
        assert signal.getsignal(signal.SIGHUP) == was
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_another_error_hides(number, monkeypatch):
    """As imports of transformers do: what they raise does not name its cause."""

    def hide(*arguments: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        raise ModuleNotFoundError("Could not import module 'PreTrainedModel'")

    # a shell that starts the tests in the background has SIGINT ignored
    before = signal.signal(number, signal.default_int_handler)
    monkeypatch.setattr("absorb_plugin.cli.frame.route_logs", hide)
    try:
        done = absorb("allocators")
        assert done.exit_code == 130
        assert done.stderr == "interrupted: no result was written\n"
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_usage_errors_have_exit_code_2(model_dir, text_file):
    seed = ["--sparsity", 0.5, "--seed", 2**32]  # numpy takes 32 bits
    options = ["--text", text_file, "--out", "./out", *seed]
    assert absorb("prune", "./none", *options).exit_code == 2
    assert absorb("eval", model_dir, "--text", text_file, "--seq-len", 1).exit_code == 2
    assert absorb("prune", model_dir).exit_code == 2


HELP = """
import sys
from typer.testing import CliRunner
from absorb_plugin.cli.app import app
result = CliRunner().invoke(app, ["prune", "--help"])
assert result.exit_code == 0 and "--recipe" in result.stdout
print([name for name in ("torch", "llmcompressor") if name in sys.modules])
"""


def test_help_is_answered_without_the_heavy_imports():
    """Less than a second, then: torch alone takes longer."""
    command = [sys.executable, "-c", HELP]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_fields_become_options():
    error = ValueError(
        "seq_len=65, text_column or overwrite=True; /seq_len/b, seq_lens"
    )
    told = "--seq-len 65, --text-column or --overwrite; /seq_len/b, seq_lens"
    assert one_line(error) == told
    error = ValueError("raise num_calibration_samples or max_seq_length")
    assert one_line(error) == "raise --samples or --seq-len"
    error = ValueError("max_loss_increase=-1, sparsity=0.5; max_sparsity=1, sparsity")
    told = "--max-loss-increase -1, --sparsity 0.5; max_sparsity=1, sparsity"
    assert one_line(error, ["sparsity", "max_loss_increase"]) == told


def test_streams_that_are_closed(model_dir: Path, tmp_path: Path) -> None:
    """As of a daemon: what was done is not called a failure for it."""
    out = tmp_path / "ratios.json"
    command = [sys.executable, "-m", "absorb_plugin.cli", "allocate", str(model_dir)]
    command += ["--allocator", "alpha_pruning", "--sparsity", "0.5"]
    command += ["--no-correction", "--ratios-out", str(out)]
    closed = f"{shlex.join(command)} >&- 2>&-"
    assert subprocess.run(closed, shell=True, check=False).returncode == 0
    assert out.is_file()


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun started 2 processes" in error_of("check", "nowhere")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "torchrun" not in error_of("check", "nowhere")
