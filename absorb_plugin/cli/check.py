"""`absorb check`: what to know of a saved model before it is served."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from absorb_plugin.cli.frame import command, four_digits, show, table_of
from absorb_plugin.cli.options import AsJson, Debug

if TYPE_CHECKING:
    from rich.table import Table

    from absorb_plugin.evaluation.check_report import CheckReport

__all__ = ["check"]


def check(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of a saved model.")
    ],
    load: Annotated[
        bool, typer.Option("--load", help="Load it with transformers as well.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare the zeros of a saved model with its recipe. Exit code 1 if broken."""
    with command(debug, upstream=False) as stdout:
        # torch and transformers take seconds to import
        if directory.is_dir():
            print(f"reading {_described(directory)}", file=sys.stderr, flush=True)
        from absorb_plugin.evaluation.check import check_checkpoint

        report = check_checkpoint(directory, load)
        if as_json:
            show(stdout, report.as_dict(), as_json)
        else:
            _print(report, stdout)
        if report.problems:
            raise typer.Exit(1)


def _described(directory: Path) -> str:
    files = [path for path in directory.glob("*.safetensors") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return f"{directory}: {size / 1e9:.2f} GB in {len(files)} files of weights"


def _print(report: "CheckReport", file: TextIO) -> None:
    from rich.console import Console

    print(_summary(report), file=file)
    if report.linears:
        Console(file=file).print(_table(report))
    for name, sentence in report.runtimes.items():
        print(f"{name}: {sentence}", file=file)
    print(f"serve: {report.serve}", file=file)
    for warning in report.warnings:
        print(f"warning: {warning}", file=file)
    for problem in report.problems:
        print(f"BROKEN: {problem}", file=file)
    print("broken" if report.problems else "nothing is broken", file=file)


def _summary(report: "CheckReport") -> str:
    quantization = "not quantised"
    if report.quantization:
        bits = "/".join(map(str, report.quantization["bits"]))
        quantization = report.other_method or str(report.format)
        quantization += f", {bits} bits" * bool(bits)
    lines = [
        f"{report.directory}: {report.model_type}, {report.dtype}, {quantization}, "
        f"{'tied' if report.tied else 'untied'} embeddings, "
        f"{report.bytes / 1e9:.2f} GB in {report.files} files"
    ]
    if report.zeros is not None:
        planned = "" if report.planned is None else f", planned {report.planned:.4f}"
        if report.ignored and report.planned_zeros is not None:
            planned = f"; in those of the plan {report.planned_zeros:.4f}{planned}"
            planned += f" ({report.ignored} Linears are not in it)"
        lines.append(f"zeros in all Linears but the head: {report.zeros:.4f}{planned}")
    if report.loads is not None:
        lines.append(f"transformers loads it: {'yes' if report.loads else 'NO'}")
    return "\n".join(lines)


def _table(report: "CheckReport") -> "Table":
    from rich.markup import escape

    from absorb_plugin.evaluation.check_report import (
        planned_share,
        planned_zero_share,
        zero_share,
    )

    # over the Linears of the plan, of which the other columns are not
    there = ["zeros there"] if report.ignored else []
    numbers = ["weights", "planned", *there, "zeros", "fewest", "most"]
    table = table_of(["block"], numbers)
    for name, linears in report.blocks().items():
        shares = [one.count.share for one in linears]
        table.add_row(
            escape(name),
            f"{sum(one.count.weights for one in linears):,}",
            four_digits(planned_share(linears)),
            *(four_digits(planned_zero_share(linears)) for _ in there),
            four_digits(zero_share(linears)),
            four_digits(min(shares)),
            four_digits(max(shares)),
        )
    return table
