"""`absorb prune`: a recipe, a text and a model in, a pruned model out."""

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from absorb_plugin.cli.frame import command, show
from absorb_plugin.cli.inputs import Source, read_model
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
    TextColumn,
    TrustRemoteCode,
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
    text_column: TextColumn = None,
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    seed: Seed = 0,
    pipeline: Annotated[
        Pipeline, typer.Option(help="llm-compressor's calibration pipeline.")
    ] = Pipeline.independent,
    dtype: DtypeOption = Dtype.auto,
    trust_remote_code: TrustRemoteCode = False,
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
        from absorb_plugin.evaluation.loading import (
            check_saving,
            load_for_pruning,
            weight_bytes,
        )
        from absorb_plugin.evaluation.perplexity import linear_sparsity
        from absorb_plugin.evaluation.text import calibration_samples

        start = time.perf_counter()
        # All that can be wrong with the arguments comes before the model is loaded.
        output.check_apart(out, model)
        output.check_output(out, overwrite)
        parsed = oneshot.load_recipe(recipe)
        if profile_cache is not None:
            oneshot.keep_profiles(parsed, profile_cache)
        documents = Source(text, dataset, split, text_column).documents()
        config, tokenizer = read_model(model, dtype, trust_remote_code, seq_len)
        output.check_space(out, weight_bytes(config, dtype.value, trust_remote_code))
        check_saving(model, config, tokenizer)
        data = calibration_samples(documents, tokenizer, samples, seq_len, seed)
        with (
            output.staged_directory(out) as staging,
            output.kept_files(out, staging),
        ):
            pruned = oneshot.prune(
                load_for_pruning(model, dtype.value, trust_remote_code),
                tokenizer,
                parsed,
                data,
                pipeline=pipeline.value,
                trust_remote_code=trust_remote_code,
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
