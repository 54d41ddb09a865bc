"""
The command `absorb`: parse, call, print.

Modules that need torch are imported inside the commands.
"""

import dataclasses
import json
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from absorb_plugin.command import command, show

__all__ = ["app"]

app = typer.Typer(
    name="absorb",
    help="Non-uniform pruning budgets from error absorption, for llm-compressor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Pipeline(str, Enum):
    independent = "independent"
    sequential = "sequential"
    basic = "basic"


class Dtype(str, Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Granularity(str, Enum):
    block = "block"
    linear = "linear"


class SinkTokens(str, Enum):
    auto = "auto"
    spare = "spare"
    perturb = "perturb"


class NoiseDtype(str, Enum):
    model = "model"
    float32 = "float32"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model directory or hub id.")
]
Text = Annotated[
    Path | None,
    typer.Option(help="Plain text, or JSON lines (.jsonl) with a field `text`."),
]
DatasetName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:CONFIG]", help="Dataset of the hub with a column `text`."
    ),
]
Split = Annotated[str, typer.Option(help="Split of --dataset.")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all random choices.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Weights' dtype; auto: as they were saved.")
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--profile-cache",
        metavar="DIRECTORY",
        help="Keep measurements here, for a run that repeats or resumes this one.",
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


@app.command()
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
        from absorb_plugin import prune as pruning
        from absorb_plugin.evaluate import linear_sparsity
        from absorb_plugin.text import calibration_samples

        start = time.perf_counter()
        # All that can be wrong with the arguments comes before the model is loaded.
        pruning.check_output(out, overwrite)
        if dtype is Dtype.auto:
            pruning.check_space(out, model)
        parsed = pruning.load_recipe(recipe)
        if profile_cache is not None:
            pruning.keep_profiles(parsed, profile_cache)
        documents, tokenizer = read_inputs(model, text, dataset, split, seq_len, dtype)
        data = calibration_samples(documents, tokenizer, samples, seq_len, seed)
        with (
            pruning.staged_directory(out) as staging,
            pruning.kept_files(out, staging),
        ):
            pruned = pruning.prune(
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


@app.command("eval")
def evaluate(
    model: Model,
    more: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...", help="More task files: --tasks tasks/*.jsonl works."
        ),
    ] = None,
    text: Text = None,
    dataset: DatasetName = None,
    split: Split = "test",
    seq_len: SeqLen = 512,
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
    dtype: DtypeOption = Dtype.auto,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Perplexity of MODEL over windows of a text, and its accuracy on tasks."""
    with command(debug) as stdout:
        from absorb_plugin import evaluate as evaluation
        from absorb_plugin.compare import save_result
        from absorb_plugin.files import check_file
        from absorb_plugin.prune import load_config
        from absorb_plugin.tasks import encode_tasks, evaluate_tasks, read_tasks
        from absorb_plugin.text import evaluation_windows

        # All that can be wrong with the arguments comes before the model is loaded.
        if more and not tasks:
            raise ValueError(f"{more[0]}: name task files behind --tasks")
        if not (text or dataset or tasks):
            raise ValueError("nothing to do: give --text, --dataset or --tasks")
        if out is not None:
            check_file(out, "--out")
        read = read_tasks([*(tasks or []), *(more or [])], limit)
        documents, tokenizer = read_inputs(
            model, text, dataset, split, seq_len, dtype, optional=bool(read)
        )
        tokens: list[list[int]] = []
        if documents:
            tokens = evaluation_windows(documents, tokenizer, seq_len, count=windows)
        encoded = encode_tasks(read, tokenizer, load_config(model))
        loaded = load_model(model, dtype.value)
        sparsity = evaluation.sparsity_if_known(loaded) if out else None
        result: dict[str, Any] = {}
        if tokens:
            value, count = evaluation.perplexity(loaded, tokens)
            result = {"perplexity": value, "tokens": count}
        for name, found in evaluate_tasks(loaded, encoded, batch_size).items():
            result[name] = dataclasses.asdict(found)
        if out is not None:
            save_result(out, model, sparsity, result)
        if as_json:
            show(stdout, result, as_json)
        else:
            evaluation.render(result, stdout)


@app.command()
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
        from absorb_plugin import compare as comparison
        from absorb_plugin.files import check_file
        from absorb_plugin.report.compare_figure import compare_charts
        from absorb_plugin.report.figure import save_figure

        if figure is not None:
            check_file(figure, "--figure")
        table = comparison.read_runs(runs)
        if figure is not None:
            charts = compare_charts(comparison.as_dict(table)["runs"])
            save_figure(figure, charts, "", columns=3)
        if as_json:
            show(stdout, comparison.as_dict(table), as_json)
        else:
            comparison.render(table, stdout)


@app.command()
def allocate(
    model: Model,
    allocator: Annotated[str, typer.Option(help="See `absorb allocators`.")],
    sparsity: Annotated[float, typer.Option(help="The budget, in [0, 1).")],
    arguments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Argument of the allocator."),
    ] = None,
    text: Text = None,
    dataset: DatasetName = None,
    split: Split = "train",
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    seed: Seed = 0,
    granularity: Annotated[
        Granularity, typer.Option(help="What the base allocator ranks.")
    ] = Granularity.block,
    correction: Annotated[
        bool, typer.Option(help="Correct the base allocation by absorption.")
    ] = True,
    dtype: DtypeOption = Dtype.auto,
    profile_cache: Cache = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compute the sparsity of every block of MODEL, without pruning."""
    with command(debug) as stdout:
        from absorb_plugin.allocation import allocate_model, as_dict, render
        from absorb_plugin.budget import check_budget
        from absorb_plugin.files import check_writable
        from absorb_plugin.modifier import AbsorptionAllocationModifier
        from absorb_plugin.text import calibration_samples

        settings = AbsorptionAllocationModifier(
            allocator=allocator,
            allocator_args=dict(map(parse_argument, arguments or [])),
            granularity=granularity.value,
            noise_seed=seed,
            profile_cache=profile_cache,
            **({} if correction else {"strength": 0}),
        )
        settings.base_allocator()
        check_budget(sparsity, settings.max_sparsity)
        if profile_cache is not None:
            check_writable("--profile-cache", str(profile_cache))
        documents, tokenizer = read_inputs(model, text, dataset, split, seq_len, dtype)
        data = calibration_samples(documents, tokenizer, samples, seq_len, seed)
        found = allocate_model(load_model(model, dtype.value), data, sparsity, settings)
        if as_json:
            show(stdout, as_dict(found, allocator), as_json)
        else:
            render(found, stdout)


@app.command()
def profile(
    model: Model,
    eta: Annotated[
        str, typer.Option(help="Lengths η of the noise, with commas between them.")
    ] = "1e-4,1e-3,1e-2,0.1,0.3,1",
    text: Text = None,
    dataset: DatasetName = None,
    split: Split = "train",
    samples: Samples = 8,
    seq_len: SeqLen = 128,
    seed: Seed = 0,
    sink_tokens: Annotated[
        SinkTokens, typer.Option(help="Tokens that get no noise.")
    ] = SinkTokens.auto,
    noise_dtype: Annotated[
        NoiseDtype, typer.Option(help="What the probe computes in.")
    ] = NoiseDtype.model,
    figure: Annotated[
        Path | None, typer.Option(help="PNG file to draw the result into.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure how MODEL absorbs or amplifies noise, over depth and over η."""
    with command(debug) as stdout:
        from absorb_plugin import dose
        from absorb_plugin.files import check_file
        from absorb_plugin.report.figure import save_figure
        from absorb_plugin.report.noise_figure import noise_charts
        from absorb_plugin.text import calibration_samples

        magnitudes = dose.parse_magnitudes(eta)
        if figure is not None:
            check_file(figure, "--figure")
        documents, tokenizer = read_inputs(model, text, dataset, split, seq_len, dtype)
        data = calibration_samples(documents, tokenizer, samples, seq_len, seed)
        found = dose.measure_doses(
            load_model(model, dtype.value),
            data,
            magnitudes,
            seed=seed,
            sink_tokens=sink_tokens.value,
            noise_dtype=noise_dtype.value,
        )
        if figure is not None:
            title = f"{Path(model).name}, computed in {found.dtype}"
            save_figure(figure, noise_charts(dose.as_dict(found)), title, columns=3)
        if as_json:
            show(stdout, dose.as_dict(found), as_json)
        else:
            dose.render(found, stdout)


@app.command()
def allocators(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the base allocators: origin, arguments, paper, cost."""
    with command(debug) as stdout:
        from absorb_plugin.plugins import listing, render

        if as_json:
            print(json.dumps(listing()), file=stdout, flush=True)
        else:
            render(stdout)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Directory for the best model and the report.")
    ] = Path("demo-output"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prune SmolLM2-135M to 60 % in four ways and compare (no hub needed)."""
    with command(debug) as stdout:
        from absorb_plugin.demo import render, run_demo

        result = run_demo(out)
        if as_json:
            show(stdout, result.as_dict(), as_json)
        else:
            render(result, stdout)


def parse_argument(argument: str) -> tuple[str, Any]:
    """`key=value`; the value is read as JSON where it is JSON, else as a string."""
    key, equals, value = argument.partition("=")
    if not (key and equals):
        raise ValueError(f"--set {argument!r}: write KEY=VALUE, as in --set m=7")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def read_inputs(
    model: str,
    text: Path | None,
    dataset: str | None,
    split: str,
    seq_len: int,
    dtype: Dtype,
    optional: bool = False,
) -> tuple[list[str], Any]:
    """
    Documents and tokenizer. All that can be wrong with either, or with the length of a
    window, is found here, before the model's weights are loaded.

    :param optional: that neither text nor dataset is given means no documents
    """
    from absorb_plugin.prune import check_length, load_config
    from absorb_plugin.text import read_documents

    documents: list[str] = []
    if text is not None or dataset is not None or not optional:
        documents = read_documents(text, dataset, split)
    config = load_config(model)
    if documents:
        check_length(config, seq_len)
    warn_if_slow(config, dtype)
    return documents, load_tokenizer(model)


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def load_model(model: str, dtype: str) -> Any:
    """Load for evaluation: on the accelerator, spread over several, or on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    device_map = "auto" if torch.accelerator.is_available() else None
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, device_map=device_map
    )


def warn_if_slow(config: Any, dtype: Dtype) -> None:
    """
    :param config: of the model that is about to be loaded in `dtype`
    """
    import torch
    from loguru import logger

    from absorb_plugin.cpu import bfloat16_is_slow

    is_bfloat16 = dtype is Dtype.bfloat16 or (
        dtype is Dtype.auto and config.dtype == torch.bfloat16
    )
    if is_bfloat16 and bfloat16_is_slow():
        logger.warning(
            "This CPU has no fast bfloat16: --dtype float32 is several times faster"
        )


if __name__ == "__main__":
    app()
