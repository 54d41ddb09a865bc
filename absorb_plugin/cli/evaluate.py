"""`absorb eval`: perplexity on a text, accuracies on tasks."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from absorb_plugin.cli import options
from absorb_plugin.cli.frame import command, four_digits, show, table_of
from absorb_plugin.cli.inputs import Source, read_model

__all__ = ["evaluate"]


def evaluate(
    model: options.Model,
    more: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...", help="More task files: --tasks tasks/*.jsonl works."
        ),
    ] = None,
    text: options.Text = None,
    dataset: options.DatasetName = None,
    split: options.Split = None,
    text_column: options.TextColumn = None,
    seq_len: options.SeqLen = 512,
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="First windows of the text; by default all."),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Zero-shot task, JSON lines. May be repeated."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="First items of every task; by default all."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences of the tasks per forward pass.")
    ] = 8,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save the result, for `absorb compare`."),
    ] = None,
    dtype: options.DtypeOption = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Perplexity of MODEL over windows of a text, and its accuracy on tasks."""
    with command(debug) as stdout:
        from absorb_plugin.evaluation.compare import save_result
        from absorb_plugin.evaluation.loading import load_model
        from absorb_plugin.evaluation.output import check_result_file, is_result
        from absorb_plugin.evaluation.perplexity import perplexity, sparsity_if_known
        from absorb_plugin.evaluation.tasks import (
            encode_tasks,
            evaluate_tasks,
            read_tasks,
        )
        from absorb_plugin.evaluation.text import evaluation_windows
        from absorb_plugin.files import json_numbers

        # All that can be wrong with the arguments comes before the model is loaded.
        if more and not tasks:
            raise ValueError(f"{more[0]}: name task files after --tasks")
        if not (text or dataset or tasks):
            raise ValueError("nothing to do: give --text, --dataset or --tasks")
        check_result_file(out, "--out", is_result)
        read = read_tasks([*(tasks or []), *(more or [])], limit)
        has_text = text is not None or dataset is not None
        source = Source(text, dataset, split, text_column, "test")
        documents = source.documents() if has_text else None
        config, tokenizer = read_model(
            model, dtype, trust_remote_code, seq_len if has_text else None
        )
        tokens: Sequence[Sequence[int]] = []
        if documents is not None:
            tokens = evaluation_windows(documents, tokenizer, seq_len, count=windows)
        encoded = encode_tasks(read, tokenizer, config.get_text_config())
        loaded = load_model(model, dtype, trust_remote_code)
        sparsity = sparsity_if_known(loaded) if out else None
        result: dict[str, Any] = {}
        if tokens:
            value, count = perplexity(loaded, tokens)
            (known,) = json_numbers([value])
            result = {"perplexity": known, "tokens": count}
        for name, found in evaluate_tasks(loaded, encoded, batch_size).items():
            result[name] = dataclasses.asdict(found)
        try:
            if out is not None:
                save_result(out, model, sparsity, result)
        finally:  # what was measured is not lost if it cannot be written
            if as_json:
                show(stdout, result, as_json)
            else:
                _print(result, stdout)


def _print(result: Mapping[str, Any], file: TextIO) -> None:
    """
    A line for the perplexity, a table of the tasks.

    :param result: `perplexity` (None where it overflows) and `tokens`, where there was
        a text, and per task an object with `acc`, `acc_norm`, `stderr` and `n`
    """
    from rich.console import Console
    from rich.markup import escape

    if "perplexity" in result:
        value = result["perplexity"]
        known = "beyond 1e308" if value is None else f"{value:.3f}"
        line = f"Perplexity {known} over {result['tokens']} tokens"
        print(line, file=file, flush=True)
    tasks = {name: one for name, one in result.items() if isinstance(one, Mapping)}
    if not tasks:
        return
    table = table_of(["task"], ["items", "acc", "± stderr", "acc_norm"])
    for name, one in tasks.items():
        values = (one["acc"], one["stderr"], one["acc_norm"])
        table.add_row(escape(name), str(one["n"]), *map(four_digits, values))
    Console(file=file).print(table)
