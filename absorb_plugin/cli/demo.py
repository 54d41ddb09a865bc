"""`absorb demo`: see what the package does, without a hub."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from absorb_plugin.cli.frame import command, show, table_of
from absorb_plugin.cli.options import AsJson, Debug

if TYPE_CHECKING:
    from absorb_plugin.evaluation.demo import DemoResult

__all__ = ["demo"]


def demo(
    out: Annotated[
        Path, typer.Option(help="Directory for the best model and the report.")
    ] = Path("demo-output"),
    sparsegpt: Annotated[
        bool | None,
        typer.Option(
            help="Whether SparseGPT prunes too.",
            show_default="where all takes less than 6 minutes",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prune SmolLM2-135M to 60 % in several ways and compare (no hub needed)."""
    stderr = sys.stderr
    with command(debug, quiet=True) as stdout:
        from absorb_plugin.evaluation.demo import run_demo

        tell = partial(print, file=stderr, flush=True)
        remedy = "absorb demo --sparsegpt runs it"
        result = run_demo(out, tell, sparsegpt, remedy)
        if as_json:
            show(stdout, result.as_dict(), as_json)
        else:
            _print(result, stdout)


def _print(result: "DemoResult", file: TextIO) -> None:
    """The table, what was gained, where it is, what to do next."""
    from rich.console import Console

    numbers = ["perplexity", "vs uniform", "sparsity", "seconds"]
    table = table_of(["pruner", "allocation"], numbers, result.title)
    for row in result.rows:
        table.add_row(
            row.pruner or "",
            row.allocation,
            f"{row.perplexity:.2f}",
            "" if row.change is None else f"{row.change:+.1%}",
            f"{row.sparsity:.4f}",
            "" if row.seconds is None else f"{row.seconds:.0f}",
        )
    Console(file=file, highlight=False).print(table)
    if result.left_out:
        print(result.left_out, file=file)
    for line in _last_lines(result):
        print(line, file=file, flush=True)


def _last_lines(result: "DemoResult") -> list[str]:
    changes = {
        row.pruner: row.change for row in result.rows if row.change is not None
    }  # the corrected allocation is each pruner's last
    gains = ", ".join(f"{change:+.0%} with {name}" for name, change in changes.items())
    return [
        f"At the same sparsity perplexity changed by {gains}, over {result.tokens} "
        f"tokens of other text ({result.seconds:.0f} s in all).",
        f"The report: {result.out}/report/report.html; the model: {result.out}/model",
        "Next, your own: absorb prune MODEL --sparsity 0.5 --text FILE --out DIRECTORY",
    ]
