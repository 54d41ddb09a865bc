"""
Is `max_loss_increase` kept? Prunes to a bound through the real `oneshot` and measures
what the loss really grew by, on held-out text.

    python integration/benchmarks/quality_target.py MODEL --text CALIBRATION \
        --eval-text HELD_OUT [--bounds 0.1 0.3 0.6] [--pruners wanda sparsegpt] \
        [--uniform 0.2 0.3 0.4 0.5 0.6] [--effort standard] [--seeds 0] \
        [--quantize w8a8 w4a16 fp8] --out results.jsonl

One line of JSON per run, appended as it completes; a run whose line is there, with the
same settings and the same content of its texts, is not repeated, of whatever commit it
is. Pruned uniformly to the sparsities of `--uniform` it says, interpolated, what
uniform reaches at the loss that a bound came to. `--quantize` quantises afterwards, as
that of `absorb prune` does: then it is the loss of both. `--table` prints the Markdown
tables, one for each combination of settings, and runs nothing.
"""

import argparse
import logging
import math
import sys
import time
from pathlib import Path

import torch
from loguru import logger
from result_lines import (
    append,
    code_version,
    described,
    digest,
    fixed_fields,
    grouped,
    other_code,
    read_lines,
    settings_of,
    to_run,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.cpu import keep_freed_memory
from absorb_plugin.evaluation.documents import read_text
from absorb_plugin.evaluation.oneshot import parse_recipe, prune
from absorb_plugin.evaluation.perplexity import linear_sparsity, perplexity
from absorb_plugin.evaluation.recipes import QUANTIZATIONS, RecipeWishes
from absorb_plugin.evaluation.text import calibration_samples, evaluation_windows
from absorb_plugin.pruners import PRUNERS

UPPER = 0.8


def load(options: argparse.Namespace) -> PreTrainedModel:
    dtype = getattr(torch, options.dtype)
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)


def run(
    cell: dict,
    options: argparse.Namespace,
    tokenizer,
    windows: list[list[int]],
    dense: float,
) -> dict:
    """:param dense: loss of the dense model on the windows, nats per token"""
    documents = read_text(options.text)
    samples = calibration_samples(
        documents, tokenizer, options.samples, options.seq_len, cell["seed"]
    )
    recipe = [
        PRUNERS[cell["pruner"]].modifier(
            sparsity=cell.get("uniform", UPPER),
            targets=["Linear"],
            ignore=["re:.*lm_head"],
        )
    ]
    if "bound" in cell:
        allocation = AbsorptionAllocationModifier(
            max_loss_increase=cell["bound"], effort=cell["effort"]
        )
        recipe.insert(0, allocation)
    model = load(options)
    if cell["quantize"] is not None:
        wishes = RecipeWishes(sparsity=UPPER, quantize=cell["quantize"])
        recipe.append(parse_recipe(wishes.text(model)).modifiers[-1])
    begin = time.perf_counter()
    model = prune(model, tokenizer, recipe, samples, seed=cell["seed"])
    seconds = time.perf_counter() - begin
    return cell | {
        "sparsity": linear_sparsity(model),
        "increase": math.log(perplexity(model, windows)[0]) - dense,
        "seconds": round(seconds, 1),
        "commit": code_version(),
    }


def cells(options: argparse.Namespace) -> list[dict]:
    fixed = fixed_fields(options) | {
        "eval_text": options.eval_text.name,
        "eval_digest": digest(options.eval_text),
    }
    kinds = [{"uniform": sparsity} for sparsity in options.uniform]
    kinds += [{"bound": bound, "effort": options.effort} for bound in options.bounds]
    return [
        fixed | {"pruner": pruner, "seed": seed, "quantize": quantize} | kind
        for seed in options.seeds
        for pruner in options.pruners
        for quantize in options.quantize or [None]
        for kind in kinds
    ]


def uniform_at(lines: list[dict], line: dict) -> str:
    """
    What uniform pruning reaches at the loss of a line. Between its own the logarithm of
    the increase is taken for straight, as it nearly is: the increase itself bends, and
    straight lines would say too little.

    :param lines: of the same model and settings
    """
    points = sorted(
        (other["sparsity"], other["increase"])
        for other in lines
        if "uniform" in other
        and all(
            other.get(name) == line.get(name) for name in ("pruner", "seed", "quantize")
        )
    )
    wanted, low, before = line["increase"], 0.0, 0.0
    if wanted <= 0:  # as much is reached by pruning nothing
        return "–"
    for sparsity, increase in points:
        if increase >= wanted:
            if before > 0:
                share = math.log(wanted / before) / math.log(increase / before)
            else:
                share = (wanted - before) / (increase - before)
            return f"{low + share * (sparsity - low):.1%}"
        low, before = sparsity, increase
    return "–"


def table(lines: list[dict]) -> str:
    """:param lines: of the same model and settings"""
    out = [
        "| pruner | effort | bound | seed | sparsity found | realised increase "
        "| within 10 % | uniform at that loss | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if "bound" not in line:
            continue
        kept = "yes" if line["increase"] <= 1.1 * line["bound"] else "no"
        what = " + ".join([line["pruner"], *filter(None, [line.get("quantize")])])
        cells = [what, line["effort"], f"{line['bound']:g}"]
        cells += [str(line["seed"]), f"{line['sparsity']:.1%}"]
        cells += [f"{line['increase']:+.3f}", kept, uniform_at(lines, line)]
        cells.append(f"{line['seconds']:.0f}")
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def print_tables(lines: list[dict]) -> None:
    for of, own in grouped(lines, judged_by):
        content = f" ({of['eval_digest']})" if of["eval_digest"] else ""
        windows = f"{of['windows']} windows of " if of["windows"] else ""
        print(
            f"### {of['model']}\n\n{described(of)}, loss on {windows}"
            f"{of['eval_text']}{content}.\n\n{table(own)}\n"
        )


def judged_by(line: dict) -> dict:
    """Model and settings of a run, and what it is judged by."""
    names = ("model", "eval_text", "eval_digest")
    return settings_of(line) | {name: line.get(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--bounds", nargs="+", type=float, default=[0.1, 0.3, 0.6])
    parser.add_argument("--pruners", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument(
        "--uniform", nargs="*", type=float, default=[0.2, 0.3, 0.4, 0.5, 0.6]
    )
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--quantize", nargs="*", default=[], choices=QUANTIZATIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    # lines of earlier versions are of models that were not quantised
    done = [{"quantize": None} | line for line in read_lines([options.out])]
    if not options.table:
        keep_freed_memory()
        logging.disable(logging.WARNING)
        logger.remove()
        logger.add(sys.stderr, level="WARNING")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        windows = evaluation_windows(
            read_text(options.eval_text), tokenizer, options.seq_len, options.windows
        )
        missing, kept = to_run(cells(options), done)
        if said := other_code(kept, code_version()):
            print(said, file=sys.stderr)
        dense = math.log(perplexity(load(options), windows)[0]) if missing else 0.0
        for cell in missing:
            done.append(run(cell, options, tokenizer, windows, dense))
            append(done[-1], options.out)
    print_tables(done)


if __name__ == "__main__":
    main()
