"""
Perplexity by the share of the descent's way that is taken (`signals.gradient.SHARE`):

    python integration/benchmarks/shares.py MODEL --text CALIBRATION \
        --eval-text HELD_OUT [OTHER ...] [--sparsity 0.6] [--seeds 0 1] \
        [--samples 8] [--seq-len 128] [--shares 0.2 0.4 0.6 0.8 1] [--start uniform]

The search before Wanda runs once for a seed, to the end of its way; then the model is
pruned at every share of it by the real `oneshot`. Share 0 is where it started. Prints a
line of JSON per pruned model, as it completes.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from controls import by_name
from datasets import Dataset
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from absorb_plugin.calibration import samples_of
from absorb_plugin.choices import budget_of
from absorb_plugin.cpu import keep_freed_memory
from absorb_plugin.evaluation.allocation import set_up
from absorb_plugin.evaluation.documents import read_text
from absorb_plugin.evaluation.oneshot import prune
from absorb_plugin.evaluation.perplexity import perplexity
from absorb_plugin.evaluation.text import calibration_samples, evaluation_windows
from absorb_plugin.method import Method
from absorb_plugin.pruners import PRUNERS
from absorb_plugin.search.descent import descend
from absorb_plugin.settings import AllocationSettings


def allocations(
    model: PreTrainedModel, samples: Dataset, options: argparse.Namespace
) -> dict[float, dict[str, float]]:
    """Share -> full name of a Linear -> its sparsity."""
    settings, pruner = AllocationSettings(allocator="owl"), PRUNERS["wanda"]()
    with set_up(model, settings) as blocks:
        budget = budget_of(blocks, options.sparsity, settings, pruner)
        batches = samples_of(samples)
        method = Method(model, blocks, batches, pruner=pruner, settings=settings)
        start = budget.uniform()
        if options.start == "base":
            start = method.base(budget).sparsity
        rounds = settings.measuring().rounds
        (stage,) = method.signal.stages(method.context, rounds)
        way = descend(start, budget, replace(stage, share=1.0), method.context.groups)
        found = {}
        for share in options.shares:
            one = budget.meet(start + share * (way.path[-1] - start))
            found[share] = by_name(blocks, budget.whole(one))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--eval-text", type=Path, nargs="+", required=True)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    shares = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    parser.add_argument("--shares", type=float, nargs="+", default=shares)
    parser.add_argument("--start", choices=["uniform", "base"], default="uniform")
    parser.add_argument("--windows", type=int, default=24, help="of 256 tokens")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    keep_freed_memory()
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = {
        path.name: evaluation_windows(read_text(path), tokenizer, 256, options.windows)
        for path in options.eval_text
    }
    text, dtype = list(read_text(options.text)), getattr(torch, options.dtype)
    for seed in options.seeds:
        sizes = (options.samples, options.seq_len)
        samples = calibration_samples(text, tokenizer, *sizes, seed)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        for share, sparsities in allocations(model, samples, options).items():
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
            pruner = PRUNERS["wanda"].modifier(
                targets=list(sparsities),
                sparsity=list(sparsities.values()),
                ignore=["re:.*lm_head"],
            )
            pruned = prune(model, tokenizer, [pruner], samples, seed=seed)
            line = {"seed": seed, "sparsity": options.sparsity, "share": share}
            for name, judging in windows.items():
                line[name] = perplexity(pruned, judging)[0]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
