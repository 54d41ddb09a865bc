"""`absorb curve`: how much worse a model gets the more of it is pruned."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from absorb_plugin.cli import options
from absorb_plugin.cli.frame import command, show, table_of
from absorb_plugin.cli.inputs import (
    Source,
    check_samples,
    check_sparsity,
    read_model,
)
from absorb_plugin.names import EffortName, PrunerName, Quantization

if TYPE_CHECKING:
    from absorb_plugin.evaluation.curve import Curve

__all__ = ["curve"]

MOST = 100


def curve(
    model: options.Model,
    text: options.Text = None,
    dataset: options.DatasetName = None,
    split: options.Split = None,
    text_column: options.TextColumn = None,
    pruner: Annotated[
        PrunerName, typer.Option(help="Whose arithmetic judges.")
    ] = "wanda",
    allocator: Annotated[str, typer.Option(help="See `absorb allocators`.")] = "owl",
    sparsities: Annotated[
        str,
        typer.Option(
            metavar="FIRST:LAST:STEP", help="Or numbers with commas between them."
        ),
    ] = "0.3:0.8:0.05",
    effort: Annotated[
        EffortName, typer.Option(help="How much is measured.")
    ] = "standard",
    quantize: Annotated[
        Quantization | None, typer.Option(help="Judge it quantised after pruning.")
    ] = None,
    samples: options.Samples = 128,
    seq_len: options.SeqLen = 512,
    seed: options.Seed = 0,
    ignore: options.Ignore = None,
    dtype: options.DtypeOption = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    profile_cache: options.Cache = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a figure, PNG.")
    ] = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Loss and perplexity of MODEL over sparsity: uniform, base, corrected."""
    fields = ("allocator", "effort", "ignore", "sparsities", "quantize")
    with command(debug, fields=fields) as stdout:
        from absorb_plugin.evaluation.curve import as_dict, measure_curve
        from absorb_plugin.evaluation.loading import empty_model, load_model
        from absorb_plugin.evaluation.oneshot import quantization_of
        from absorb_plugin.evaluation.output import check_figure
        from absorb_plugin.evaluation.text import calibration_samples
        from absorb_plugin.files import check_writable
        from absorb_plugin.report.curve_figure import curve_charts
        from absorb_plugin.report.figure import save_figure
        from absorb_plugin.settings import AllocationSettings

        settings = AllocationSettings(
            allocator=allocator,
            effort=effort,
            ignore=ignore or [],
            profile_cache=profile_cache,
        )
        settings.base_allocator()
        budgets = parse_sparsities(sparsities)
        for budget in budgets:
            check_sparsity("--sparsities", budget, settings.max_sparsity)
        check_samples(samples)
        if settings.profile_cache is not None:
            check_writable("--profile-cache", settings.profile_cache)
        check_figure(figure, "--figure")
        documents = Source(text, dataset, split, text_column).documents()
        config, tokenizer = read_model(model, dtype, trust_remote_code, seq_len)
        if quantize is not None:  # widths that cannot be are told of before weights
            quantization_of(empty_model(config, trust_remote_code), quantize)
        data = calibration_samples(documents, tokenizer, samples, seq_len, seed)
        loaded = load_model(model, dtype, trust_remote_code)
        found = measure_curve(
            loaded, data, budgets, settings, pruner=pruner, quantize=quantize
        )
        result = as_dict(found, pruner, allocator)
        if figure is not None:
            save_figure(figure, curve_charts(result), Path(model).name)
        if as_json:
            show(stdout, result, as_json)
        else:
            _print(found, result["knee"], allocator, stdout)


def parse_sparsities(text: str) -> list[float]:
    """
    :return: ascending, each once
    :raises ValueError: naming what is no range and no list of numbers
    """
    remedy = (
        f"--sparsities {text!r}: write FIRST:LAST:STEP, as in 0.3:0.8:0.05, or numbers "
        "with commas between them"
    )
    try:
        numbers = [float(part) for part in re.split("[:,]", text)]
    except ValueError as error:
        raise ValueError(remedy) from error
    if not all(map(math.isfinite, numbers)):
        raise ValueError(remedy)
    if ":" not in text:
        _check_count(len(set(numbers)), remedy)
        return sorted(set(numbers))
    first, last, step = numbers if len(numbers) == 3 else (0.0, 0.0, 0.0)
    if not (step > 0 and first <= last and "," not in text):
        raise ValueError(remedy)
    count = (last - first) / step + 1e-9  # infinite if the step is tiny
    _check_count(count + 1, remedy)
    return [round(first + number * step, 10) for number in range(int(count) + 1)]


def _check_count(count: float, remedy: str) -> None:
    if count >= MOST + 1:
        raise ValueError(f"{remedy}; these are {count:.0f}, and {MOST} are the most")


def _print(found: "Curve", knee: str, allocator: str, file: TextIO) -> None:
    from rich.console import Console
    from rich.markup import escape

    from absorb_plugin.overflow import exp

    numbers = ["sparsity", "uniform", escape(allocator), "corrected", "loss increase"]
    title = f"Perplexity; dense {_two_digits(exp(found.dense))}"
    if (cost := found.quantization) is not None:
        alone = _two_digits(exp(found.dense + cost.increase))
        title += f", quantised {alone} ({cost.modifiers[0]}, as all below)"
    table = table_of([], numbers, title)
    for point in found.points:
        perplexities = [
            _two_digits(exp(found.dense + increase))
            for increase in point.increases.values()
        ]
        error = point.errors["ours"]
        known = "" if math.isnan(error) else f" ± {error:.3f}"
        table.add_row(
            f"{point.sparsity:g}",
            *perplexities,
            f"{point.increases['ours']:+.3f}{known}",
        )
    which = "tokens that the search saw too" if found.chosen_by else "held-out tokens"
    table.caption = f"{knee} ({found.tokens:,} {which})"
    Console(file=file).print(table)


def _two_digits(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.3g}"
