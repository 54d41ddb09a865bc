"""`absorb demo`: see what the package does, without a hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from absorb_plugin.cli.frame import command, show
from absorb_plugin.cli.options import AsJson, Debug

if TYPE_CHECKING:
    from absorb_plugin.evaluation.demo import DemoResult

__all__ = ["demo"]


def demo(
    out: Annotated[
        Path, typer.Option(help="Directory for the best model and the report.")
    ] = Path("demo-output"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prune SmolLM2-135M to 60 % in four ways and compare (no hub needed)."""
    with command(debug) as stdout:
        from absorb_plugin.evaluation.demo import run_demo

        result = run_demo(out)
        if as_json:
            show(stdout, result.as_dict(), as_json)
        else:
            _print(result, stdout)


def _print(result: "DemoResult", file: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=result.title)
    table.add_column("allocation")
    for column in ("perplexity", "vs uniform", "sparsity", "seconds"):
        table.add_column(column, justify="right")
    for row in result.rows:
        table.add_row(
            row.name,
            f"{row.perplexity:.2f}",
            "" if row.change is None else f"{row.change:+.1%}",
            f"{row.sparsity:.4f}",
            "" if row.seconds is None else f"{row.seconds:.0f}",
        )
    console = Console(file=file, highlight=False)
    console.print(table)
    console.print(f"{result.tokens} tokens evaluated, {result.seconds:.0f} s in all")
    console.print(f"Model and report: {result.out}/model, {result.out}/report")
    console.print(f"It says: {result.sentence}", markup=False)
