"""
What a bound on the loss, and a curve, take beside one allocation, in one run.

    python integration/benchmarks/quality_time.py MODEL --text CALIBRATION \
        [--pruners wanda sparsegpt] [--bounds 0.1 0.3 0.6] [--curve 0.3:0.8:0.05] \
        [--sparsity 0.5] [--effort standard] [--samples 64] [--seq-len 128] \
        [--dtype float32] [--repetitions 3] [--out results.jsonl]

The allocation is that of `--sparsity`, the budget of a bound at most 80 %, as in
quality_target.py. All are made in turn, `--repetitions` times, by the functions behind
`absorb allocate` and `absorb curve`: nothing is pruned. Prints a table of medians, and
appends one line of JSON per measurement to `--out` as it completes. `--curve ''` leaves
the curve out.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from result_lines import code_version
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin.cli.curve import parse_sparsities
from absorb_plugin.cpu import keep_freed_memory
from absorb_plugin.evaluation.allocation import allocate_model
from absorb_plugin.evaluation.curve import measure_curve
from absorb_plugin.evaluation.documents import read_text
from absorb_plugin.evaluation.text import calibration_samples
from absorb_plugin.pruners import PRUNERS
from absorb_plugin.settings import AllocationSettings

UPPER = 0.8
ALLOCATION = "one allocation"

Run = Callable[[], object]


def runs(
    model: torch.nn.Module, samples: object, pruner: str, options: argparse.Namespace
) -> dict[str, Run]:
    """What is timed, by its name; the allocation first."""

    def allocation(sparsity: float, bound: float | None) -> Run:
        settings = AllocationSettings(effort=options.effort, max_loss_increase=bound)
        return partial(
            allocate_model, model, samples, sparsity, settings, pruner=pruner
        )

    found = {ALLOCATION: allocation(options.sparsity, None)}
    for bound in options.bounds:
        found[f"bound of {bound:g}"] = allocation(UPPER, bound)
    if options.curve:
        sparsities = parse_sparsities(options.curve)
        settings = AllocationSettings(effort=options.effort)
        found[f"curve of {len(sparsities)} sparsities"] = partial(
            measure_curve, model, samples, sparsities, settings, pruner=pruner
        )
    return found


def table(seconds: dict[tuple[str, str], list[float]]) -> str:
    """:param seconds: of every repetition, by pruner and what was run"""
    out = ["| pruner | | seconds, median | times one allocation |", "|---|---|---|---|"]
    for (pruner, name), own in seconds.items():
        whole = statistics.median(seconds[pruner, ALLOCATION])
        median = statistics.median(own)
        ratio = "" if name == ALLOCATION else f"{median / whole:.1f}"
        out.append(f"| {pruner} | {name} | {median:.1f} | {ratio} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--pruners", nargs="+", default=sorted(PRUNERS, reverse=True))
    parser.add_argument("--bounds", nargs="*", type=float, default=[0.1, 0.3, 0.6])
    parser.add_argument("--curve", default="0.3:0.8:0.05")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    keep_freed_memory()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = calibration_samples(
        read_text(options.text), tokenizer, options.samples, options.seq_len, 0
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    )
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(options.repetitions):
        for pruner in options.pruners:
            for name, run in runs(model, samples, pruner, options).items():
                begin = time.perf_counter()
                run()
                took = time.perf_counter() - begin
                seconds[pruner, name].append(took)
                line = vars(options) | {"pruner": pruner, "run": name}
                line |= {"number": number, "seconds": took, "commit": code_version()}
                if options.out is not None:
                    with options.out.open("a") as file:
                        file.write(json.dumps(line, default=str) + "\n")
    print(table(seconds))


if __name__ == "__main__":
    main()
