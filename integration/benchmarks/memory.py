"""
Resident memory that every probe takes beside the model, against `probe_memory`.

    python integration/benchmarks/memory.py [--memory 1.5] [--samples 4] [--tokens 32] \
        [--probes statistics noise response gradient masked pruned pruned_model] \
        [--dtype bfloat16]

Each probe runs in a process of its own on a LLaMA of 1.1 billion random weights (22
blocks of hidden size 2,048, vocabulary 32,000). The peak is what the kernel saw: VmHWM,
reset before the probe starts, less VmRSS at that time. Linux only. Prints a line of
JSON per probe. For the sake of time the noise probe and the response start after
four of the blocks, so they carry four trajectories.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

PROBES = (
    "statistics",
    "noise",
    "response",
    "gradient",
    "masked",
    "pruned",
    "pruned_model",
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

    from absorb_plugin.blocks import find_blocks
    from absorb_plugin.forward.inputs import InputStatistics
    from absorb_plugin.forward.memory import footprint
    from absorb_plugin.forward.run import run_probes
    from absorb_plugin.groups import Groups
    from absorb_plugin.judges import MaskedLoss, PrunedLoss
    from absorb_plugin.pruners import SparseGPT, Wanda
    from absorb_plugin.pruners.masks import MaskedWeights
    from absorb_plugin.pruners.slopes import MaskedSlopes
    from absorb_plugin.signals.gradient import GradientProbe
    from absorb_plugin.signals.noise import NoiseProbe
    from absorb_plugin.signals.pruned_model import PrunedModel
    from absorb_plugin.signals.response import ResponseProbe

    torch.manual_seed(0)
    model = random_llama(getattr(torch, options.dtype), options.layers)
    blocks = find_blocks(model)
    count = len(blocks)
    few = sorted({round(i * (count - 1) / 3) for i in range(4)})
    # the response has a trajectory for every block that can be pruned
    names = [n for i in few for n in blocks.linears() if f".{i}." in n]
    some = blocks.restrict(names)
    sums = {n: torch.rand(x.in_features) + 0.1 for n, x in blocks.linears().items()}
    flat, half = np.full(len(blocks.linears()), 0.5), np.full(len(names), 0.5)
    masks = MaskedWeights(some, Wanda(), sums)
    all_masks = MaskedWeights(blocks, Wanda(), sums)
    slopes = MaskedSlopes(blocks, all_masks, flat, 0.05)
    probe = {
        "statistics": lambda: InputStatistics(blocks),
        "noise": lambda: NoiseProbe(few, count, 1e-2, 0),
        "response": lambda: ResponseProbe(
            some, Groups.at("block", some), masks, half, 0.1
        ),
        "gradient": lambda: GradientProbe(blocks, slopes),
        "masked": lambda: MaskedLoss(blocks, all_masks, [flat] * 2),
        "pruned": lambda: PrunedLoss(blocks, SparseGPT(), [flat] * 2, 2),
        "pruned_model": lambda: PrunedModel(blocks, SparseGPT(), flat, 0.05),
    }[options.probes[0]]()
    ids = torch.randint(3, 32000, (options.samples, options.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    limit = int(options.memory * GIB)
    need = footprint(model, blocks.modules, [probe.needs], limit)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    before, begin = status("VmRSS"), time.perf_counter()
    run_probes(model, blocks, [batch], [probe], memory=limit)
    return {
        "probe": options.probes[0],
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
    parser.add_argument("--probes", nargs="+", default=PROBES, choices=PROBES)
    parser.add_argument("--memory", type=float, default=1.5, help="probe_memory, GiB")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options)))
        return
    for probe in options.probes:
        command = [sys.executable, __file__, "--here", "--probes", probe]
        for name in ("memory", "samples", "tokens", "layers", "dtype"):
            command += [f"--{name}", str(getattr(options, name))]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(output.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
