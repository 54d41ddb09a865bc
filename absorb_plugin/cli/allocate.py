"""`absorb allocate`: the sparsity of every block, without pruning."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from absorb_plugin.cli import options
from absorb_plugin.cli.frame import command, show, table_of
from absorb_plugin.cli.inputs import (
    Source,
    check_samples,
    check_sparsity,
    read_model,
)
from absorb_plugin.names import EffortName, Granularity, Level, PrunerName

if TYPE_CHECKING:
    from absorb_plugin.allocation import Allocation
    from absorb_plugin.settings import AllocationSettings

__all__ = ["allocate"]

# Of recipes, for which there are options here.
FIELDS = ("allocator", "effort", "granularity", "ignore", "level", "sparsity")


def allocate(
    model: options.Model,
    allocator: Annotated[str, typer.Option(help="See `absorb allocators`.")],
    sparsity: Annotated[float, typer.Option(help="The budget, in [0, 1).")],
    arguments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Argument of the allocator."),
    ] = None,
    text: options.Text = None,
    dataset: options.DatasetName = None,
    split: options.Split = None,
    text_column: options.TextColumn = None,
    samples: options.Samples = 128,
    seq_len: options.SeqLen = 512,
    seed: options.Seed = 0,
    granularity: Annotated[
        Granularity, typer.Option(help="What the base allocator ranks.")
    ] = "block",
    level: Annotated[Level, typer.Option(help="What is corrected alike.")] = "auto",
    effort: Annotated[
        EffortName, typer.Option(help="How much is measured.")
    ] = "standard",
    pruner: Annotated[
        PrunerName, typer.Option(help="What the allocation is for.")
    ] = "wanda",
    correction: Annotated[
        bool, typer.Option(help="Correct the base allocation by absorption.")
    ] = True,
    ignore: options.Ignore = None,
    dtype: options.DtypeOption = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    profile_cache: options.Cache = None,
    recipe_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Save a recipe that llm-compressor follows without this package.",
        ),
    ] = None,
    ratios_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save Linear -> sparsity, JSON."),
    ] = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Compute the sparsity of every block of MODEL, without pruning."""
    with command(debug, fields=FIELDS) as stdout:
        from absorb_plugin.choices import needs_text
        from absorb_plugin.evaluation.allocation import allocate_model, as_dict
        from absorb_plugin.evaluation.loading import load_model
        from absorb_plugin.evaluation.text import calibration_samples
        from absorb_plugin.files import check_writable
        from absorb_plugin.settings import AllocationSettings

        settings = AllocationSettings(
            allocator=allocator,
            allocator_args=dict(map(_parse_argument, arguments or [])),
            granularity=granularity,
            level=level,
            effort=effort,
            ignore=ignore or [],
            profile_cache=profile_cache,
            strength="auto" if correction else 0,
        )
        settings.base_allocator()
        check_sparsity("--sparsity", sparsity, settings.max_sparsity)
        if correction:
            check_samples(samples, ", or --no-correction")
        if settings.profile_cache is not None:
            check_writable("--profile-cache", settings.profile_cache)
        _check_outputs(recipe_out, ratios_out, model, text)
        has_text = text is not None or dataset is not None or needs_text(settings)
        source = Source(text, dataset, split, text_column)
        documents = source.documents() if has_text else None
        _, tokenizer = read_model(
            model, dtype, trust_remote_code, seq_len if has_text else None
        )
        data = None
        if documents is not None:
            data = calibration_samples(documents, tokenizer, samples, seq_len, seed)
        loaded = load_model(model, dtype, trust_remote_code)
        found = allocate_model(loaded, data, sparsity, settings, pruner=pruner)
        came_from: dict[str, Any] = {"model": model, "data": None}
        if data is not None:
            came_from |= {"data": source.name, "samples": samples}
            came_from |= {"seq_len": seq_len, "seed": seed}
        try:
            _save(found, settings, pruner, came_from, recipe_out, ratios_out)
        finally:  # what was measured is not lost if it cannot be written
            if as_json:
                show(stdout, as_dict(found, allocator, pruner), as_json)
            else:
                _print(found, stdout)


def _save(
    found: "Allocation",
    settings: "AllocationSettings",
    pruner: str,
    came_from: dict[str, Any],
    recipe_out: Path | None,
    ratios_out: Path | None,
) -> None:
    """:param came_from: model and calibration data, for those who read the ratios"""
    from absorb_plugin.evaluation.allocation import ratios
    from absorb_plugin.evaluation.recipes import native_recipe
    from absorb_plugin.files import replace_file

    if recipe_out is not None:
        recipe = native_recipe(found.linear_sparsities(), pruner)
        replace_file(recipe_out, recipe.encode())
    if ratios_out is not None:
        content = ratios(found, settings, pruner, **came_from)
        replace_file(ratios_out, json.dumps(content, indent=1).encode())


def _check_outputs(
    recipe: Path | None, ratios: Path | None, model: str, text: Path | None
) -> None:
    from absorb_plugin.evaluation.output import check_result_file, has_fields
    from absorb_plugin.evaluation.recipes import is_native_recipe

    folder = Path(model)
    inputs = [*(folder.iterdir() if folder.is_dir() else ()), *([text] if text else ())]
    check_result_file(recipe, "--recipe-out", is_native_recipe, inputs)
    is_ratios = has_fields("achieved", "settings", "linears")
    check_result_file(ratios, "--ratios-out", is_ratios, inputs)
    if recipe and ratios and recipe.resolve() == ratios.resolve():
        raise ValueError(f"--recipe-out and --ratios-out are one file, {recipe}")


def _parse_argument(argument: str) -> tuple[str, Any]:
    """`key=value`; the value is read as JSON where it is JSON, else as a string."""
    key, equals, value = argument.partition("=")
    if not (key and equals):
        raise ValueError(f"--set {argument!r}: write KEY=VALUE, as in --set m=7")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _print(allocation: "Allocation", file: TextIO) -> None:
    from rich.console import Console
    from rich.markup import escape

    table = table_of(["block"], ["weights", "metric", "base", "sparsity"])
    bases = allocation.block_means(allocation.base.sparsity)
    sparsities = allocation.block_means(allocation.sparsity)
    for row, index in enumerate(allocation.blocks.prunable):
        block = allocation.blocks.blocks[index]
        table.add_row(
            escape(block.name),
            f"{block.parameters:,}",
            f"{allocation.base.metric[row]:.4g}",
            f"{bases[row]:.4f}",
            f"{sparsities[row]:.4f}",
        )
    table.caption = (
        f"{allocation.achieved():.4f} of {allocation.budget.sparsity} over all"
    )
    Console(file=file).print(table)
