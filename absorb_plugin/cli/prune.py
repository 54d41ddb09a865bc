"""`absorb prune`: a model and a text in, a pruned model out."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from absorb_plugin.cli import options
from absorb_plugin.cli.frame import command, show
from absorb_plugin.cli.inputs import (
    Source,
    check_samples,
    check_sparsity,
    read_model,
)
from absorb_plugin.names import EffortName, PrunerName, Quantization

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe

    from absorb_plugin.evaluation.recipes import RecipeWishes
    from absorb_plugin.modifier import AbsorptionAllocationModifier

__all__ = ["prune"]

# The recipe that was made, beside the recipe.yaml that llm-compressor saves.
MADE = "absorb_recipe.yaml"

# Fields of a recipe, for which there are options where there is none.
WISHES = (
    *("sparsity", "max_loss_increase", "pruner", "allocator", "effort", "quantize"),
    "ignore",
)

Pipeline = Literal["independent", "sequential", "basic"]


def prune(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Directory for the pruned model.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="llm-compressor recipe, YAML, in place of the next seven."),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the weights to prune, in [0, 1).")
    ] = None,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Prune as much as the loss per token allows to grow by so much "
            "(0.05: perplexity +5 %), with --quantize by both; --sparsity is then the "
            "most.",
        ),
    ] = None,
    pruner: Annotated[
        PrunerName | None, typer.Option(help="By default sparsegpt.")
    ] = None,
    allocator: Annotated[
        str | None, typer.Option(help="See `absorb allocators`; by default owl.")
    ] = None,
    effort: Annotated[
        EffortName | None,
        typer.Option(help="How much is measured; by default standard."),
    ] = None,
    quantize: Annotated[
        Quantization | None, typer.Option(help="Quantise after pruning.")
    ] = None,
    ignore: options.Ignore = None,
    text: options.Text = None,
    dataset: options.DatasetName = None,
    split: options.Split = None,
    text_column: options.TextColumn = None,
    samples: options.Samples = 128,
    seq_len: options.SeqLen = 512,
    seed: options.Seed = 0,
    pipeline: Annotated[
        Pipeline, typer.Option(help="llm-compressor's calibration pipeline.")
    ] = "independent",
    dtype: options.DtypeOption = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model in --out.")
    ] = False,
    profile_cache: options.Cache = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Prune MODEL to a sparsity, a quality or by a recipe, and save it."""
    fields = [] if recipe else [*WISHES]
    fields += ["profile_cache"] if profile_cache else []
    with command(debug, fields=fields) as stdout:
        from absorb_plugin.evaluation import oneshot, output
        from absorb_plugin.evaluation.loading import (
            check_saving,
            copy_processor,
            empty_model,
            load_for_pruning,
            weight_bytes,
        )
        from absorb_plugin.evaluation.perplexity import linear_sparsity
        from absorb_plugin.evaluation.text import calibration_samples

        start = time.perf_counter()
        # All that can be wrong with the arguments comes before the model is loaded.
        output.check_apart(out, model)
        read = {"--recipe": recipe, "--text": text, "--dataset": dataset}
        output.check_inputs_apart(out, read)
        output.check_output(out, overwrite, model)
        given: dict[str, Any] = {
            "sparsity": sparsity,
            "max_loss_increase": max_loss_increase,
            "pruner": pruner,
            "allocator": allocator,
            "effort": effort,
            "quantize": quantize,
            "ignore": ignore or None,
        }
        parsed = _read_recipe(recipe, given)
        wishes = None if parsed else _wishes(given, samples)
        documents = Source(text, dataset, split, text_column).documents()
        config, tokenizer = read_model(model, dtype, trust_remote_code, seq_len)
        empty, made = empty_model(config, trust_remote_code), ""
        if wishes is not None:
            made = wishes.text(empty)
            print(made, file=sys.stderr)
            parsed = oneshot.parse_recipe(made)
        assert parsed is not None
        if profile_cache is not None:
            oneshot.keep_profiles(parsed, Path(profile_cache))
        oneshot.check_caches(parsed, out)
        bits = oneshot.least_bits(parsed)
        output.check_space(out, weight_bytes(empty, dtype, bits))
        check_saving(model, empty, tokenizer)
        data = calibration_samples(documents, tokenizer, samples, seq_len, seed)
        modifiers = oneshot.ours(parsed)
        with output.staged_directory(out) as staging:
            oneshot.stage_reports(parsed, out, staging)
            pruned = oneshot.prune(
                load_for_pruning(model, dtype, trust_remote_code),
                tokenizer,
                parsed,
                data,
                pipeline=pipeline,
                trust_remote_code=trust_remote_code,
                seed=seed,
                output_dir=staging,
            )
            copy_processor(model, config, staging)
            if made:
                (staging / MADE).write_text(made, encoding="utf-8")
        # counting the zeros of a large model takes a while
        with output.telling_it_is_complete(out):
            result = {
                "out": str(out),
                "sparsity": linear_sparsity(pruned),
                "samples": samples,
                "seq_len": seq_len,
                "seconds": round(time.perf_counter() - start, 1),
            }
            _show(result, modifiers, as_json, stdout)


def _show(
    result: dict[str, Any],
    modifiers: Sequence["AbsorptionAllocationModifier"],
    as_json: bool,
    file: TextIO,
) -> None:
    """What was saved, and what a quality that was asked for came to."""
    from absorb_plugin.report.words import quality_found, quality_sentence

    line = (
        "Saved to {out}: {sparsity:.4f} of the Linear weights are zero "
        "({samples} x {seq_len} tokens, {seconds} s)"
    )
    profiles = [one for modifier in modifiers for one in modifier.profiles()]
    qualities = [found for one in profiles if (found := quality_found(one))]
    if qualities:
        result["quality"] = qualities
        line = "\n".join([line, *filter(None, map(quality_sentence, profiles))])
    show(file, result, as_json, line)


def _read_recipe(recipe: Path | None, given: dict[str, Any]) -> "Recipe | None":
    """
    :param given: option -> value, None where it was not given
    :raises ValueError: if there is a recipe and an option that the recipe decides
    """
    from absorb_plugin.evaluation.oneshot import load_recipe

    if recipe is None:
        return None
    for name, value in given.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"--recipe {recipe} decides what {option} {value} asks for: give one "
                "of the two"
            )
    return load_recipe(recipe)


def _wishes(given: dict[str, Any], samples: int) -> "RecipeWishes":
    from absorb_plugin.evaluation.recipes import RecipeWishes
    from absorb_plugin.settings import LEAST_SAMPLES, MAX_SPARSITY

    if given["sparsity"] is None and given["max_loss_increase"] is None:
        raise ValueError(
            "how much is to be pruned? Give --sparsity, --max-loss-increase or --recipe"
        )
    if given["sparsity"] is not None:
        check_sparsity("--sparsity", given["sparsity"], MAX_SPARSITY)
    check_samples(samples)
    if given["max_loss_increase"] is not None and samples < LEAST_SAMPLES:
        raise ValueError(
            f"--samples {samples}: a loss is held with a margin of one standard "
            f"error, and of fewer than {LEAST_SAMPLES} samples there are no two to "
            "judge by. Give more"
        )
    wishes = RecipeWishes(**{k: v for k, v in given.items() if v is not None})
    wishes.check()
    return wishes
