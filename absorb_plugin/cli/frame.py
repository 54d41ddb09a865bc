"""
The frame of every command of `absorb`: where output, logs, errors and signals go.

A command's result goes to stdout and everything else (logs, progress, warnings,
errors) to stderr.
"""

import codecs
import contextlib
import io
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["command", "four_digits", "show", "table_of"]

# Fields of the library that are options of commands, in the library's messages. Not in
# a path, and none that is a field of recipes as well.
FIELD = re.compile(
    r"(?<![\w/.-])(overwrite(?==)|seq_len|text_column|trust_remote_code"
    r"|num_calibration_samples|max_seq_length)(?:=(\w+))?(?![\w/-])"
)
RENAMED = {"num_calibration_samples": "samples", "max_seq_length": "seq_len"}

# Of loguru, and one that llm-compressor adds, of the number below.
LEVELS = ["TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "METRIC", "ERROR", "CRITICAL"]
METRIC = 38


@contextlib.contextmanager
def command(
    debug: bool,
    quiet: bool = False,
    fields: Collection[str] = (),
    upstream: bool = True,
) -> Iterator[TextIO]:
    """
    The frame of every command. In it `sys.stdout` is stderr, for llm-compressor and
    others print and log to it; the result is written to what the block receives. An
    exception becomes one line on stderr and exit code 1; an interrupt, whose words are
    told where it has any, 130.

    :param debug: show a traceback and all logs instead
    :param quiet: unless `debug`, show errors and nothing else: no bars, no logs, no
        warnings, of which a report tells as well
    :param fields: of recipes, for which this call has options instead
    :param upstream: whether llm-compressor is needed, which takes a second to import
    """
    stdout = _opened(sys.stdout)
    replace_unknown(stdout)
    check_one_process()
    quiet = quiet and not debug
    silence = io.StringIO() if quiet else _opened(sys.stderr)
    interrupts: list[int] = []
    try:
        with (
            noting_interrupts(interrupts),
            contextlib.redirect_stderr(silence),
            contextlib.redirect_stdout(silence),
        ):
            if upstream:
                set_up_upstream()
            route_logs(debug, silence)
            keep_freed_memory()
            try:
                yield stdout
            finally:
                stdout.flush()
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise  # the last when `| head` has seen enough: click ends quietly
    except (KeyboardInterrupt, Exception) as error:
        if debug and not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        # imports of transformers make an error of their own of it, without the cause
        if isinstance(error, KeyboardInterrupt) or interrupts:
            told = isinstance(error, KeyboardInterrupt) and str(error)
            typer.echo(f"interrupted: {told or 'no result was written'}", err=True)
            raise typer.Exit(130) from error
        if not debug:
            typer.echo(f"error: {one_line(error, fields)}", err=True)
        raise typer.Exit(1) from error


def check_one_process() -> None:
    """Each process of torchrun would do all of the work, and write the same files."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and processes != "1":
        typer.echo(
            f"error: torchrun started {processes} processes, and absorb's commands run "
            "as one: start it without torchrun, or call oneshot from Python for "
            "several ranks (docs/distributed.md)",
            err=True,
        )
        raise typer.Exit(1)


def _opened(stream: TextIO | None) -> TextIO:
    """A daemon may have closed it; what goes there is of interest to nobody then."""
    return stream if stream is not None else Path(os.devnull).open("w")


@contextlib.contextmanager
def noting_interrupts(seen: list[int]) -> Iterator[None]:
    """
    SIGTERM, as batch systems send it, and SIGHUP of a connection that is lost leave as
    little behind as Ctrl-C does.

    :param seen: gets the number of every such signal that comes
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only there can a signal be handled
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    # not where a shell has it ignored, as for what runs in the background, or nohup
    usual: dict[str, Any] = {
        "SIGINT": signal.default_int_handler,
        "SIGHUP": signal.SIG_DFL,  # the terminal is gone; Windows has none
    }
    for name, handler in usual.items():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is handler:
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def replace_unknown(stream: TextIO) -> None:
    """What its encoding lacks (η, ±) becomes `?`: a result is not lost over that."""
    if not isinstance(stream, io.TextIOWrapper):
        return
    # Of the C locale; UTF-8 lacks nothing, and names of files keep their bytes there.
    escapes = stream.errors == "surrogateescape"
    is_utf_8 = codecs.lookup(stream.encoding).name == "utf-8"
    if stream.errors == "strict" or (escapes and not is_utf_8):
        stream.reconfigure(errors="replace")


def keep_freed_memory() -> None:
    """Imported late, for it needs torch."""
    from absorb_plugin import cpu

    cpu.keep_freed_memory()


def set_up_upstream() -> None:
    """
    llm-compressor sets up loguru when it is first imported, and says if there is no
    accelerator.
    """
    _log_level()  # which it would end at, with a traceback
    with contextlib.redirect_stdout(io.StringIO()):
        import llmcompressor  # noqa: F401


def route_logs(debug: bool, stream: TextIO) -> None:
    """
    Send loguru to a stream: our lines and warnings of llm-compressor, or everything.
    LLM_COMPRESSOR_LOG_LEVEL is obeyed as in llm-compressor itself.
    """
    level = _log_level()
    from loguru import logger

    lowest = METRIC if level == "METRIC" else logger.level(level).no

    def wanted(record: Any) -> bool:
        # four lines for each pruned Linear, not a warning
        is_metric = record["level"].name == "METRIC"
        if (record["name"] or "").startswith("absorb_plugin"):
            return True
        return debug or (record["level"].no >= lowest and not is_metric)

    logger.remove()
    logger.add(
        stream,
        level="DEBUG" if debug else "INFO",
        format="{level: <7} {message}" if not debug else "{time} {level} {message}",
        filter=wanted,
    )


def _log_level() -> str:
    level = (os.environ.get("LLM_COMPRESSOR_LOG_LEVEL") or "WARNING").upper()
    if level not in LEVELS:
        raise ValueError(
            f"LLM_COMPRESSOR_LOG_LEVEL={level} is set, and no level: set it to one of "
            f"{', '.join(LEVELS)}, or unset it"
        )
    return level


def one_line(error: Exception, fields: Collection[str] = ()) -> str:
    """
    The message of an exception, with its kind where that is needed to read it.

    :param fields: that are options as well where they stand with a value
    """
    message = FIELD.sub(_option, " ".join(str(error).split()))
    for field in fields:
        option = f"--{field.replace('_', '-')} "
        message = re.sub(rf"(?<![\w/.-]){field}=", option, message)
    if isinstance(error, ValueError | OSError | ImportError) and message:
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


def _option(field: re.Match) -> str:
    """`seq_len=65` is `--seq-len 65` here, `overwrite=True` is `--overwrite`."""
    name, value = field.groups()
    option = f"--{RENAMED.get(name, name).replace('_', '-')}"
    return option if value in (None, "True") else f"{option} {value}"


def show(
    stdout: TextIO, result: Mapping[str, Any], as_json: bool, line: str = ""
) -> None:
    """
    :param result: names and values, all of them for JSON
    :param line: template of the same for people
    """
    text = json.dumps(result, allow_nan=False) if as_json else line.format(**result)
    print(text, file=stdout, flush=True)


def table_of(
    words: Iterable[str], numbers: Iterable[str] = (), title: str | None = None
) -> "Table":
    """
    A table without rows, of which a narrow terminal or a pipe cuts nothing off.

    :param words: columns of words, which come first
    :param numbers: columns of numbers
    """
    from rich.table import Table

    table = Table(title=title)
    for column in words:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", overflow="fold")
    return table


def four_digits(value: float | None) -> str:
    """Of a cell, which is empty where there is none."""
    return "" if value is None else f"{value:.4f}"
