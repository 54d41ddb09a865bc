"""`absorb allocators`: which base allocators are installed."""

import json
from collections.abc import Sequence
from typing import Any, TextIO

from absorb_plugin.cli.frame import command, table_of
from absorb_plugin.cli.options import AsJson, Debug

__all__ = ["allocators"]


def allocators(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the base allocators: origin, arguments, paper, cost."""
    with command(debug) as stdout:
        from absorb_plugin.plugins import listing

        if as_json:
            print(json.dumps(listing(), allow_nan=False), file=stdout, flush=True)
        else:
            _print(listing(), stdout)


def _print(entries: Sequence[dict[str, Any]], file: TextIO) -> None:
    from rich.console import Console
    from rich.markup import escape

    columns = ("name", "from", "arguments", "cost beside pruning", "paper")
    table = table_of(columns)
    for entry in entries:
        arguments = (
            f"{key} (required)" if key in entry["required"] else f"{key}={value}"
            for key, value in entry["arguments"].items()
        )
        cells = (
            entry["name"],
            entry["distribution"],
            ", ".join(arguments),
            entry["cost"],
            entry["paper"],
        )
        table.add_row(*map(escape, cells))
    Console(file=file).print(table)
