"""`absorb prune`: a recipe, a text and a model in, a pruned model out."""

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from absorb_plugin.cli.frame import command, show
from absorb_plugin.cli.inputs import read_inputs
from absorb_plugin.cli.options import (
    AsJson,
    Cache,
    DatasetName,
    Debug,
    Dtype,
    DtypeOption,
    Model,
    Samples,
    Seed,
    SeqLen,
    Split,
    Text,
)

__all__ = ["prune"]


class Pipeline(str, Enum):
    independent = "independent"
    sequential = "sequential"
    basic = "basic"


def prune(
    model: Model,
    recipe: Annotated[Path, typer.Option(help="llm-compressor recipe, YAML.")],
    out: Annotated[Path, typer.Option(help="Directory for the pruned model.")],
    text: Text = None,
    dataset: DatasetName = None,
    split: Split = "train",
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    seed: Seed = 0,
    pipeline: Annotated[
        Pipeline, typer.Option(help="llm-compressor's calibration pipeline.")
    ] = Pipeline.independent,
    dtype: DtypeOption = Dtype.auto,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model in --out.")
    ] = False,
    profile_cache: Cache = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prune MODEL by a recipe, calibrated on a text, and save it."""
    with command(debug) as stdout:
        from absorb_plugin.evaluation import oneshot, output
        from absorb_plugin.evaluation.perplexity import linear_sparsity
        from absorb_plugin.evaluation.text import calibration_samples

        start = time.perf_counter()
        # All that can be wrong with the arguments comes before the model is loaded.
        output.check_output(out, overwrite)
        if dtype is Dtype.auto:
            output.check_space(out, model)
        parsed = oneshot.load_recipe(recipe)
        if profile_cache is not None:
            oneshot.keep_profiles(parsed, profile_cache)
        documents, tokenizer = read_inputs(model, text, dataset, split, seq_len, dtype)
        data = calibration_samples(documents, tokenizer, samples, seq_len, seed)
        with (
            output.staged_directory(out) as staging,
            output.kept_files(out, staging),
        ):
            pruned = oneshot.prune(
                model,
                tokenizer,
                parsed,
                data,
                pipeline=pipeline.value,
                dtype=dtype.value,
                seed=seed,
                output_dir=staging,
            )
        result = {
            "out": str(out),
            "sparsity": linear_sparsity(pruned),
            "samples": samples,
            "seq_len": seq_len,
            "seconds": round(time.perf_counter() - start, 1),
        }
        show(
            stdout,
            result,
            as_json,
            "Saved to {out}: {sparsity:.4f} of the Linear weights are zero "
            "({samples} x {seq_len} tokens, {seconds} s)",
        )
