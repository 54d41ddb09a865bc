"""
How small the weights of saved models become on disk: as they are, and compressed by
zlib and zstd, which is what zeros are good for without a runtime that knows of them.

    python integration/benchmarks/size_on_disk.py DIR ... [--zstd-level 3]

prints a Markdown table with a row per directory. `--quantize DENSE OUT` first writes a
dense model in W4A16 (groups of 64 columns) to compare with:

    python integration/benchmarks/size_on_disk.py pruned --quantize dense dense-w4a16
"""

import argparse
from pathlib import Path

import pyarrow
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin.evaluation.check import check_checkpoint


def compressed(files: list[Path], name: str, level: int) -> int:
    """Bytes of all files, each compressed by itself."""
    codec = pyarrow.Codec(name, compression_level=level)
    return sum(
        len(codec.compress(pyarrow.memory_map(str(path)).read_buffer()))
        for path in files
    )


def quantize(dense: Path, out: Path) -> None:
    """4 bits, a scale per 64 columns, by rounding alone."""
    weights = {"num_bits": 4, "strategy": "group", "group_size": 64}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(dense, dtype="auto"),
        tokenizer=AutoTokenizer.from_pretrained(dense),
        recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
        output_dir=str(out),
    )


def row(directory: Path, zstd_level: int) -> str:
    files = sorted(directory.glob("*.safetensors"))
    report = check_checkpoint(directory)
    form = report.format or f"plain {report.dtype}"
    sizes = [sum(path.stat().st_size for path in files)]
    sizes += [compressed(files, "gzip", 6), compressed(files, "zstd", zstd_level)]
    cells = " | ".join(f"{size / 1e6:.1f}" for size in sizes)
    return f"| {directory.name} | {form} | {report.zeros:.3f} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--quantize", type=Path, nargs=2, metavar=("DENSE", "OUT"))
    parser.add_argument("--zstd-level", type=int, default=3)
    options = parser.parse_args()
    models = options.models
    if options.quantize:
        quantize(*options.quantize)
        models += [*options.quantize]
    level = options.zstd_level
    print(f"| model | format | zeros | MB | zlib 6 | zstd {level} |")
    print("|---|---|---|---|---|---|")
    for directory in models:
        print(row(directory, level), flush=True)


if __name__ == "__main__":
    main()
