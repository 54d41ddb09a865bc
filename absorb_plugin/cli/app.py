"""The application: which commands there are."""

import typer

from absorb_plugin.cli.allocate import allocate
from absorb_plugin.cli.allocators import allocators
from absorb_plugin.cli.check import check
from absorb_plugin.cli.compare import compare
from absorb_plugin.cli.curve import curve
from absorb_plugin.cli.demo import demo
from absorb_plugin.cli.evaluate import evaluate
from absorb_plugin.cli.noise import noise
from absorb_plugin.cli.prune import prune

__all__ = ["app"]

app = typer.Typer(
    name="absorb",
    help="Non-uniform pruning budgets from error absorption, for llm-compressor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(prune)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(check)
app.command()(allocate)
app.command()(curve)
app.command()(noise)
app.command()(allocators)
app.command()(demo)

if __name__ == "__main__":
    app()
