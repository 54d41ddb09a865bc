"""`absorb noise`: how a model absorbs or amplifies noise."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from absorb_plugin.cli import options
from absorb_plugin.cli.frame import command, show, table_of
from absorb_plugin.cli.inputs import Source, read_model
from absorb_plugin.names import NoiseDtype, SinkTokens

if TYPE_CHECKING:
    from absorb_plugin.signals.noise_scan import NoiseScan

__all__ = ["noise"]


def noise(
    model: options.Model,
    eta: Annotated[
        str, typer.Option(help="Lengths η of the noise, with commas between them.")
    ] = "1e-4,1e-3,1e-2,0.1,0.3,1",
    text: options.Text = None,
    dataset: options.DatasetName = None,
    split: options.Split = None,
    text_column: options.TextColumn = None,
    samples: options.Samples = 8,
    seq_len: options.SeqLen = 128,
    seed: options.Seed = 0,
    sink_tokens: Annotated[
        SinkTokens, typer.Option(help="Tokens that get no noise.")
    ] = "auto",
    noise_dtype: Annotated[
        NoiseDtype, typer.Option(help="What the probe computes in.")
    ] = "model",
    figure: Annotated[
        Path | None, typer.Option(help="PNG file to draw the result into.")
    ] = None,
    dtype: options.DtypeOption = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Measure how MODEL absorbs or amplifies noise, over depth and over η."""
    with command(debug) as stdout:
        from absorb_plugin.evaluation.loading import load_model
        from absorb_plugin.evaluation.output import check_figure
        from absorb_plugin.evaluation.text import calibration_samples
        from absorb_plugin.report.figure import save_figure
        from absorb_plugin.report.noise_figure import noise_charts
        from absorb_plugin.signals.noise_scan import as_dict, scan_noise

        magnitudes = _parse_magnitudes(eta)
        check_figure(figure, "--figure")
        documents = Source(text, dataset, split, text_column).documents()
        _, tokenizer = read_model(model, dtype, trust_remote_code, seq_len)
        data = calibration_samples(documents, tokenizer, samples, seq_len, seed)
        found = scan_noise(
            load_model(model, dtype, trust_remote_code),
            data,
            magnitudes,
            seed=seed,
            sink_tokens=sink_tokens,
            noise_dtype=noise_dtype,
        )
        if figure is not None:
            title = f"{Path(model).name}, computed in {found.dtype}"
            save_figure(figure, noise_charts(as_dict(found)), title, columns=3)
        if as_json:
            show(stdout, as_dict(found), as_json)
        else:
            _print(found, stdout)


def _parse_magnitudes(text: str) -> list[float]:
    """
    :param text: numbers with commas between them
    :return: ascending, each once
    :raises ValueError: naming what is no positive number
    """
    found = set()
    for part in text.split(","):
        try:
            eta = float(part)
        except ValueError:
            eta = math.nan
        if not (math.isfinite(eta) and eta > 0):
            raise ValueError(
                f"--eta {part.strip()!r}: write positive numbers with commas between "
                "them, as in --eta 1e-3,1e-2,0.1"
            )
        found.add(eta)
    return sorted(found)


def _print(found: "NoiseScan", file: TextIO) -> None:
    """The ratio r per block and η."""
    from rich.console import Console
    from rich.markup import escape

    below_floor = found.below_floor()
    marks = ["*" if eta in below_floor else "" for eta in found.magnitudes]
    numbers = [f"η={eta:g}{mark}" for eta, mark in zip(found.magnitudes, marks)]
    table = table_of(["noise after"], numbers, f"Ratio r, computed in {found.dtype}")
    for row, name in enumerate(found.names):
        table.add_row(
            escape(name), *(f"{profile.ratio[row]:.3f}" for profile in found.profiles)
        )
    table.caption = f"rounding floor {found.floor[-1]:.1e}"
    if below_floor:
        table.caption += "; * less than 5 times that"
    Console(file=file).print(table)
