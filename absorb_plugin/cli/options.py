"""Options that several commands share, each with one meaning and one help text."""

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "AsJson",
    "Cache",
    "DatasetName",
    "Debug",
    "Dtype",
    "DtypeOption",
    "Ignore",
    "Model",
    "Samples",
    "Seed",
    "SeqLen",
    "Split",
    "Text",
    "TextColumn",
    "TrustRemoteCode",
]


Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model directory or hub id.")
]
Text = Annotated[
    Path | None,
    typer.Option(help="Plain text, or rows: JSON lines or array, CSV, parquet."),
]
DatasetName = Annotated[
    str | None, typer.Option(metavar="NAME[:CONFIG]", help="Dataset of the hub.")
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Of --dataset; by default train, for `eval` test."
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column of the rows, with text or chats; by default `text` or `messages`.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model."),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all random choices.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Weights' dtype; auto: as they were saved.")
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--profile-cache",
        metavar="DIRECTORY",
        help="Keep measurements here, for a run that repeats or resumes this one.",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        metavar="PATTERN",
        help="Linears to leave dense: full names, or re: and an expression. Repeat it "
        "for several.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout.")
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", envvar="ABSORB_DEBUG", help="Show all logs, and tracebacks."
    ),
]
