"""
Resident memory that every station takes beside the model, against `sweep_memory`.

    python integration/benchmarks/memory.py [--memory 1.5] [--samples 4] [--tokens 32] \
        [--stations statistics noise response gradient candidates rehearsal] \
        [--dtype bfloat16]

Each station runs in a process of its own on a LLaMA of 1.1 billion random weights (22
blocks of hidden size 2,048, vocabulary 32,000). The peak is what the kernel saw: VmHWM,
reset before the station starts, less VmRSS at that time. Linux only. Prints a line of
JSON per station. For the sake of time the noise probe and the response start behind
four of the blocks, so they carry four trajectories.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

STATIONS = (
    "statistics",
    "noise",
    "response",
    "gradient",
    "candidates",
    "rehearsal",
)
GIB = 2**30


def status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def random_llama(dtype, layers: int):
    """Random weights, made where they stay: no second copy in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        attn_implementation="eager",
    )
    torch.set_default_dtype(dtype)
    with no_init_weights():
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    first = model.model.layers[0].state_dict()
    for tensor in (model.model.embed_tokens.weight, model.lm_head.weight):
        tensor.data.normal_(std=0.02)
    for tensor in first.values():
        if tensor.dim() == 2:
            tensor.normal_(std=0.02)
    for layer in model.model.layers[1:]:  # equal weights: drawing them takes minutes
        layer.load_state_dict(first)
    return model


def measure(options: argparse.Namespace) -> dict:
    import numpy as np
    import torch
    from absorb_plugin.absorption import NoiseProbe
    from absorb_plugin.compensation import Compensation
    from absorb_plugin.gradient import GradientProbe
    from absorb_plugin.memory import footprint
    from absorb_plugin.rehearsal import Rehearsal
    from absorb_plugin.response import CandidateScores, ResponseProbe
    from absorb_plugin.statistics import InputStatistics
    from absorb_plugin.sweep import sweep

    from absorb_plugin.blocks import find_blocks

    torch.manual_seed(0)
    model = random_llama(getattr(torch, options.dtype), options.layers)
    blocks = find_blocks(model)
    count = len(blocks)
    few = sorted({round(i * (count - 1) / 3) for i in range(4)})
    # the response has a trajectory for every block that can be pruned
    names = [n for i in few for n in blocks.linears() if f".{i}." in n]
    some = blocks.restrict(names)
    sums = {n: torch.rand(x.in_features) + 0.1 for n, x in blocks.linears().items()}
    flat = np.full(count, 0.5)
    station = {
        "statistics": lambda: InputStatistics(blocks),
        "noise": lambda: NoiseProbe(few, count, 1e-2, 0),
        "response": lambda: ResponseProbe(some, sums, flat[: len(few)], 0.1),
        "gradient": lambda: GradientProbe(blocks, sums, flat, 0.05),
        "candidates": lambda: CandidateScores(blocks, sums, [flat] * 2),
        "rehearsal": lambda: Rehearsal(blocks, sums, [flat] * 2, Compensation(), 2),
    }[options.stations[0]]()
    ids = torch.randint(3, 32000, (options.samples, options.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    limit = int(options.memory * GIB)
    need = footprint(model, blocks.modules, [station], limit)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    before, begin = status("VmRSS"), time.perf_counter()
    sweep(
        model,
        blocks.modules,
        [block.name for block in blocks.blocks],
        [batch],
        [station],
        memory=limit,
    )
    return {
        "station": options.stations[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": options.dtype,
        "samples": options.samples,
        "tokens": options.tokens,
        "model_gib": round(before / GIB, 3),
        "peak_gib": round((status("VmHWM") - before) / GIB, 3),
        "limit_gib": options.memory,
        "least_gib": round((need.fixed + need.sample(options.tokens)) / GIB, 3),
        "seconds": round(time.perf_counter() - begin),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stations", nargs="+", default=STATIONS, choices=STATIONS)
    parser.add_argument("--memory", type=float, default=1.5, help="sweep_memory, GiB")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options)))
        return
    for station in options.stations:
        command = [sys.executable, __file__, "--here", "--stations", station]
        for name in ("memory", "samples", "tokens", "layers", "dtype"):
            command += [f"--{name}", str(getattr(options, name))]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(output.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
