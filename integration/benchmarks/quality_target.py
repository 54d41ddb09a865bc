"""
Is `max_loss_increase` kept? Prunes to a bound through the real `oneshot` and measures
what the loss really grew by, on held-out text.

    python integration/benchmarks/quality_target.py MODEL --text CALIBRATION \
        --eval-text HELD_OUT [--bounds 0.1 0.3 0.6] [--pruners wanda sparsegpt] \
        [--seeds 0] --out results.jsonl

One line of JSON per run, appended as it completes; a run whose line is there is not
repeated. Beside each it prunes uniformly to sparsities around the one found, for what
uniform reaches at the same loss. `--table` prints the Markdown table and runs nothing.
"""

import argparse
import json
import logging
import math
import sys
import time
from pathlib import Path

import torch
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.cpu import keep_freed_memory
from absorb_plugin.evaluation.documents import read_text
from absorb_plugin.evaluation.oneshot import prune
from absorb_plugin.evaluation.perplexity import linear_sparsity, perplexity
from absorb_plugin.evaluation.text import calibration_samples, evaluation_windows

PRUNERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
UPPER = 0.8
# Below what was found: uniform is pruned to these, and one that keeps the loss counts.
BELOW = (0.0, 0.05, 0.1, 0.15, 0.2)


def load(options: argparse.Namespace) -> PreTrainedModel:
    dtype = getattr(torch, options.dtype)
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)


def pruned(
    cell: dict, options: argparse.Namespace, tokenizer, sparsity: float, bound: float
) -> tuple[PreTrainedModel, float]:
    """
    :param bound: 0 for uniform
    :return: the model and seconds
    """
    documents = read_text(options.text)
    samples = calibration_samples(
        documents, tokenizer, options.samples, options.seq_len, cell["seed"]
    )
    recipe = [
        PRUNERS[cell["pruner"]](
            sparsity=sparsity, targets=["Linear"], ignore=["re:.*lm_head"]
        )
    ]
    if bound:
        recipe.insert(0, AbsorptionAllocationModifier(max_loss_increase=bound))
    begin = time.perf_counter()
    model = prune(load(options), tokenizer, recipe, samples, seed=cell["seed"])
    return model, time.perf_counter() - begin


def run(
    cell: dict, options: argparse.Namespace, tokenizer, windows: list[list[int]]
) -> dict:
    dense = math.log(perplexity(load(options), windows)[0])
    model, seconds = pruned(cell, options, tokenizer, UPPER, cell["bound"])
    found = linear_sparsity(model)
    increase = math.log(perplexity(model, windows)[0]) - dense
    uniform = 0.0
    for below in BELOW:
        sparsity = found - below
        if sparsity <= 0:
            break
        other, _ = pruned(cell, options, tokenizer, sparsity, 0.0)
        if math.log(perplexity(other, windows)[0]) - dense <= increase:
            uniform = linear_sparsity(other)
            break
    return cell | {
        "sparsity": found,
        "increase": increase,
        "uniform": uniform,
        "seconds": round(seconds, 1),
    }


def cells(options: argparse.Namespace) -> list[dict]:
    fixed = {
        "model": Path(options.model).name,
        "text": Path(options.text).name,
        "eval_text": Path(options.eval_text).name,
        "samples": options.samples,
        "seq_len": options.seq_len,
        "dtype": options.dtype,
    }
    return [
        fixed | {"pruner": pruner, "bound": bound, "seed": seed}
        for seed in options.seeds
        for pruner in options.pruners
        for bound in options.bounds
    ]


def table(lines: list[dict]) -> str:
    out = [
        "| model | pruner | bound | seed | sparsity found | realised increase "
        "| within 10 % | uniform at that loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        kept = "yes" if line["increase"] <= 1.1 * line["bound"] else "no"
        cells = [line["model"], line["pruner"], f"{line['bound']:g}", str(line["seed"])]
        cells += [f"{line['sparsity']:.1%}", f"{line['increase']:+.3f}", kept]
        cells.append(f"{line['uniform']:.1%}")
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--bounds", nargs="+", type=float, default=[0.1, 0.3, 0.6])
    parser.add_argument("--pruners", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    done = []
    if options.out.exists():
        done = [json.loads(line) for line in options.out.read_text().splitlines()]
    if not options.table:
        keep_freed_memory()
        logging.disable(logging.WARNING)
        logger.remove()
        logger.add(sys.stderr, level="WARNING")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        windows = evaluation_windows(
            read_text(options.eval_text), tokenizer, options.seq_len, options.windows
        )
        for cell in cells(options):
            if any(cell.items() <= line.items() for line in done):
                continue
            done.append(run(cell, options, tokenizer, windows))
            with options.out.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    print(table(done))


if __name__ == "__main__":
    main()
