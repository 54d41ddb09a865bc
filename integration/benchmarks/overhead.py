"""
What the allocation costs beside the `oneshot` it serves, in one run.

    python integration/benchmarks/overhead.py MODEL --text CALIBRATION \
        [--pruner sparsegpt] [--samples 128] [--seq-len 512] [--dtype float32] \
        [--layers N] [--allocation-only] [--out results.jsonl]

Prints one JSON object, and appends it to `--out`: seconds of every probe of the
allocation, of the allocation, and of the whole `oneshot`; its share in the whole, and
in what pruning takes without it; and the most memory that the allocation and the
pruning took beside what there was before, on the accelerator, or, without one, resident
(Linux). `--layers` keeps the first N blocks only and `--allocation-only` ends before
pruning, to see how the cost grows.
"""

import argparse
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin import AbsorptionAllocationModifier, allocate
from absorb_plugin.evaluation.documents import read_text
from absorb_plugin.evaluation.oneshot import prune
from absorb_plugin.evaluation.text import calibration_samples
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.pruners import PRUNERS

from memory import GIB, status  # isort: skip

seconds: dict[str, float] = defaultdict(float)
gib: dict[str, float] = {}


@contextmanager
def peak(name: str) -> Iterator[None]:
    """Note the most memory taken meanwhile."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
        before = status("VmRSS")
    try:
        yield
    finally:
        most = torch.cuda.max_memory_allocated() if gpu else status("VmHWM")
        gib[name] = round((most - before) / GIB, 3)


class Done(Exception):
    """The allocation is made."""


def timed(owner: object, name: str, label: Callable[..., str]) -> None:
    """Add up the time spent in a function, by what its arguments say it is."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds[label(*args)] += time.perf_counter() - begin

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
    parser.add_argument("--layers", type=int)
    parser.add_argument("--allocation-only", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    timed(ProbeRunner, "run", lambda self, what, *rest: what.lower())
    timed(allocate, "allocate", lambda *args: "allocate")
    timed_allocate = allocate.allocate

    def watched(*args, **kwargs):
        with peak("allocation_gib"):
            allocation = timed_allocate(*args, **kwargs)
        if options.allocation_only:
            raise Done
        return allocation

    allocate.allocate = watched
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = calibration_samples(
        read_text(options.text), tokenizer, options.samples, options.seq_len, 0
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=getattr(torch, options.dtype),
        **({} if options.layers is None else {"num_hidden_layers": options.layers}),
    )
    pruner = PRUNERS[options.pruner].modifier(
        sparsity=options.sparsity, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    modifier = AbsorptionAllocationModifier(allocator=options.allocator)
    begin = time.perf_counter()
    with suppress(Done), peak("oneshot_gib"):
        prune(model, tokenizer, [modifier, pruner], samples)
    total, allocation = time.perf_counter() - begin, seconds["allocate"]
    result = {
        "model": Path(options.model).name,
        "layers": model.config.num_hidden_layers,
        "pruner": options.pruner,
        "samples": options.samples,
        "seq_len": options.seq_len,
        "dtype": options.dtype,
        **{name: round(value, 1) for name, value in seconds.items()},
        **gib,
    }
    if not options.allocation_only:
        result |= {
            "oneshot": round(total, 1),
            "share_of_whole": round(allocation / total, 3),
            "share_of_pruning": round(allocation / (total - allocation), 3),
        }
    print(json.dumps(result))
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
