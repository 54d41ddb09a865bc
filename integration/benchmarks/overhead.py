"""
What the allocation costs beside the `oneshot` it serves, in one run.

    python integration/benchmarks/overhead.py MODEL --text CALIBRATION \
        [--pruner sparsegpt] [--samples 128] [--seq-len 512] [--dtype float32]

Prints one JSON object: seconds of every station of the allocation, of the allocation,
and of the whole `oneshot`, and the share of the allocation in what pruning takes
without it.
"""

import argparse
import functools
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.allocation import Calibration
from absorb_plugin.prune import prune
from absorb_plugin.text import calibration_samples, read_text

from quality import PRUNERS  # isort: skip

seconds: dict[str, float] = defaultdict(float)


def timed(owner: type, name: str) -> None:
    """Add up the time spent in a method."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - begin

    setattr(owner, name, wrapper)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--pruner", default="sparsegpt", choices=sorted(PRUNERS))
    parser.add_argument("--allocator", default="owl")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    for station in ("statistics", "absorption", "direction", "score"):
        timed(Calibration, station)
    timed(AbsorptionAllocationModifier, "allocate")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = calibration_samples(
        read_text(options.text), tokenizer, options.samples, options.seq_len, 0
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    )
    pruner = PRUNERS[options.pruner](
        sparsity=options.sparsity, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    modifier = AbsorptionAllocationModifier(allocator=options.allocator)
    begin = time.perf_counter()
    prune(model, tokenizer, [modifier, pruner], samples)
    total = time.perf_counter() - begin
    print(
        json.dumps(
            {
                "model": Path(options.model).name,
                "pruner": options.pruner,
                "samples": options.samples,
                "seq_len": options.seq_len,
                "dtype": options.dtype,
                **{name: round(value, 1) for name, value in seconds.items()},
                "oneshot": round(total, 1),
                "share": round(seconds["allocate"] / (total - seconds["allocate"]), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
