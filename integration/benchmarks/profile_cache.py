"""
What `profile_cache` costs and saves: one allocation without it, one that fills it, the
same again, and one at another sparsity.

    python integration/benchmarks/profile_cache.py MODEL --text CALIBRATION \
        [--sparsity 0.6] [--other 0.5] [--samples 16] [--seq-len 128] [--rounds 4]

Prints one JSON line per run: CPU seconds of the allocation and of hashing the weights
within it, block passes (a block run once on one batch), and what lies in the cache
afterwards. The first three allocations must be the same to the last bit.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import absorb_plugin.fingerprint as fingerprint
from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.allocate import Allocation
from absorb_plugin.blocks import find_blocks
from absorb_plugin.evaluation.allocation import allocate_model
from absorb_plugin.evaluation.documents import read_text
from absorb_plugin.evaluation.text import calibration_samples


class Counts:
    """CPU seconds of hashing and block passes of one allocation."""

    def __init__(self) -> None:
        self.hashing = 0.0
        self.passes = 0

    def hash(self, model: torch.nn.Module) -> str:
        begin = time.process_time()
        digest = WEIGHTS_DIGEST(model)
        self.hashing += time.process_time() - begin
        return digest

    def count(self, *_: object) -> None:
        self.passes += 1


WEIGHTS_DIGEST = fingerprint.weights_digest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--other", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = read_text(options.text)
    data = calibration_samples(text, tokenizer, options.samples, options.seq_len, 0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    # after the forward: a mask replaces that of a Linear, never that of a block
    counts = Counts()
    for block in find_blocks(model).modules:
        block.register_forward_hook(lambda *_: counts.count())

    with tempfile.TemporaryDirectory() as folder:
        same: list[Allocation] = []
        for name, sparsity, cache in (
            ("without", options.sparsity, None),
            ("filling", options.sparsity, folder),
            ("again", options.sparsity, folder),
            ("other sparsity", options.other, folder),
        ):
            counts = Counts()
            fingerprint.weights_digest = counts.hash
            settings = AbsorptionAllocationModifier(
                rounds=options.rounds,
                profile_cache=cache,
                report_dir=folder,  # so that the noise probe runs
            )
            begin = time.process_time()
            found = allocate_model(model, data, sparsity, settings)
            total = time.process_time() - begin
            entries = list(Path(folder).glob("*.safetensors"))
            line = {
                "run": name,
                "cpu_seconds": round(total, 1),
                "hashing": round(counts.hashing, 2),
                "block_passes": counts.passes,
                "entries": len(entries),
                "kilobytes": sum(entry.stat().st_size for entry in entries) // 1000,
            }
            print(json.dumps(line), flush=True)
            if sparsity == options.sparsity:
                same.append(found)
        assert len({str(x.linear_sparsities()) for x in same}) == 1


if __name__ == "__main__":
    main()
