"""`absorb compare`: runs side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from absorb_plugin.cli.frame import command, show, table_of
from absorb_plugin.cli.options import AsJson, Debug

if TYPE_CHECKING:
    from absorb_plugin.evaluation.compare import Run

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Directory with profile.json (or report/) and eval*.json in it, or a "
            "JSON file of `absorb eval`.",
        ),
    ],
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a figure, PNG.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Perplexity, accuracies and realised sparsity of runs, side by side."""
    with command(debug) as stdout:
        from absorb_plugin.evaluation.compare import as_dict, read_runs
        from absorb_plugin.evaluation.output import check_figure
        from absorb_plugin.report.compare_figure import compare_charts
        from absorb_plugin.report.figure import save_figure

        check_figure(figure, "--figure")
        found = read_runs(runs)
        if figure is not None:
            charts = compare_charts(as_dict(found)["runs"])
            save_figure(figure, charts, "", columns=3)
        if as_json:
            show(stdout, as_dict(found), as_json)
        else:
            _print(found, stdout)


def _print(runs: Sequence["Run"], file: TextIO) -> None:
    from rich.console import Console
    from rich.markup import escape

    from absorb_plugin.evaluation.compare import task_names

    tasks = task_names(runs)
    numbers = ["sparsity", "perplexity", *map(escape, tasks)]
    table = table_of(["run", "allocation"], numbers)
    if tasks:
        table.caption = "accuracy ± standard error; norm: by length of the choice"
    for run in runs:
        table.add_row(
            escape(run.name),
            escape(run.allocation or ""),
            "" if run.sparsity is None else f"{run.sparsity:.4f}",
            "" if run.perplexity is None else f"{run.perplexity:.2f}",
            *(_accuracy(run.tasks.get(name)) for name in tasks),
        )
    Console(file=file).print(table)


def _accuracy(task: Mapping[str, Any] | None) -> str:
    if task is None:
        return ""
    text = f"{task['acc']:.3f}"
    if task.get("stderr") is not None:
        text += f" ± {task['stderr']:.3f}"
    if task.get("acc_norm") is not None:
        text += f"\nnorm {task['acc_norm']:.3f}"
    return text
