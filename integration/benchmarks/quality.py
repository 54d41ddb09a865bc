"""
Perplexity of every allocation on held-out text, through the real `oneshot`.

    python integration/benchmarks/quality.py MODEL --text CALIBRATION \
        --eval-text HELD_OUT [--allocators owl alpha_pruning] \
        [--pruners wanda sparsegpt] [--sparsities 0.5 0.6 0.7] [--seeds 0 1 2] \
        [--methods uniform atp base paper ours] --out results.jsonl

One line of JSON per run, appended as it completes; a run whose line is there already is
not repeated. `--table` prints the Markdown table of a file of results and runs nothing.

Methods: `uniform`; `atp`, the depth-only ramp at the best of a small grid of β, chosen
on the very text that it is judged by, which favours it; `base`, the allocator alone;
`paper`, the noise ratio at η = 1e-2 with noise on every token and strength 0.1; `ours`,
the defaults of the modifier; `gradient`, `response` and `noise`, the same with that
signal (not in the table, but in the results).
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.evaluate import linear_sparsity, perplexity
from absorb_plugin.prune import prune
from absorb_plugin.text import calibration_samples, evaluation_windows, read_text

PRUNERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
ATP_BETAS = (0.0025, 0.005, 0.01)


def allocation(method: str, allocator: str) -> AbsorptionAllocationModifier | None:
    if method == "uniform":
        return None
    if method.startswith("atp:"):
        return AbsorptionAllocationModifier(
            allocator="atp",
            allocator_args={"beta": float(method.removeprefix("atp:"))},
            strength=0,
        )
    settings: dict = {
        "base": {"strength": 0},
        "paper": {"signal": "noise", "strength": 0.1, "sink_tokens": "perturb"},
        "ours": {},
        "gradient": {"signal": "gradient"},
        "response": {"signal": "response"},
        "noise": {"signal": "noise"},
    }[method]
    return AbsorptionAllocationModifier(allocator=allocator, **settings)


def run(cell: dict, options: argparse.Namespace, tokenizer, windows) -> dict:
    samples = calibration_samples(
        read_text(options.text),
        tokenizer,
        options.samples,
        options.seq_len,
        cell["seed"],
    )
    modifier = allocation(cell["method"], cell["allocator"])
    pruner = PRUNERS[cell["pruner"]](
        sparsity=cell["sparsity"], targets=["Linear"], ignore=["re:.*lm_head"]
    )
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    begin = time.perf_counter()
    pruned = prune(
        model,
        tokenizer,
        [pruner] if modifier is None else [modifier, pruner],
        samples,
        seed=cell["seed"],
    )
    seconds = time.perf_counter() - begin
    value, tokens = perplexity(pruned, windows)
    return cell | {
        "perplexity": value,
        "tokens": tokens,
        "realised": linear_sparsity(pruned),
        "seconds": round(seconds, 1),
    }


def cells(options: argparse.Namespace) -> list[dict]:
    methods = []
    for method in options.methods:
        betas = [f"atp:{beta}" for beta in ATP_BETAS]
        methods += betas if method == "atp" else [method]
    result = []
    for seed in options.seeds:
        for sparsity in options.sparsities:
            for pruner in options.pruners:
                for method in methods:
                    free = method == "uniform" or method.startswith("atp:")
                    for allocator in ["-"] if free else options.allocators:
                        result.append(
                            {
                                "model": Path(options.model).name,
                                "text": Path(options.text).name,
                                "eval_text": Path(options.eval_text).name,
                                "samples": options.samples,
                                "seq_len": options.seq_len,
                                "dtype": options.dtype,
                                "pruner": pruner,
                                "sparsity": sparsity,
                                "method": method,
                                "allocator": allocator,
                                "seed": seed,
                            }
                        )
    return result


def table(lines: list[dict]) -> str:
    """Markdown: a row per pruner, sparsity, allocator; mean (± spread) of seeds."""

    def of(pruner: str, sparsity: float, method: str, allocator: str) -> list[float]:
        return [
            line["perplexity"]
            for line in lines
            if (line["pruner"], line["sparsity"]) == (pruner, sparsity)
            and (line["method"], line["allocator"]) == (method, allocator)
        ]

    def shown(values: list[float]) -> str:
        if not values:
            return "–"
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        return f"{mean(values):.1f}{spread}"

    out = [
        "| pruner | sparsity | uniform | ATP, best β | base | its perplexity "
        "| paper's setting | ours | ours vs base |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    keys = {(x["pruner"], x["sparsity"], x["allocator"]) for x in lines}
    for pruner, sparsity, allocator in sorted(keys):
        if allocator == "-":
            continue
        atp = [of(pruner, sparsity, f"atp:{beta}", "-") for beta in ATP_BETAS]
        atp = min((values for values in atp if values), key=mean, default=[])
        base = of(pruner, sparsity, "base", allocator)
        ours = of(pruner, sparsity, "ours", allocator)
        change = f"{mean(ours) / mean(base) - 1:+.1%}" if base and ours else "–"
        uniform = of(pruner, sparsity, "uniform", "-")
        paper = of(pruner, sparsity, "paper", allocator)
        row = [pruner, f"{sparsity:.0%}", shown(uniform), shown(atp), allocator]
        row += [shown(base), shown(paper), shown(ours), change]
        out.append(f"| {' | '.join(row)} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--allocators", nargs="+", default=["owl", "alpha_pruning"])
    parser.add_argument("--pruners", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6, 0.7])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--methods", nargs="+", default=["uniform", "atp", "base", "paper", "ours"]
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()

    done = []
    if options.out.exists():
        done = [json.loads(line) for line in options.out.read_text().splitlines()]
    if not options.table:
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
            line = run(cell, options, tokenizer, windows)
            done.append(line)
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), file=sys.stderr, flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
