"""
How small the weights of saved models become on disk: as they are, and compressed by
zlib and zstd, which is what zeros are good for without a runtime that knows of them.

    python integration/benchmarks/size_on_disk.py DIR ... [--zstd-level 19]

prints a Markdown table with a row per directory. `--quantize DENSE OUT` first writes a
dense model in W4A16 (groups of 64 columns) to compare with:

    python integration/benchmarks/size_on_disk.py pruned --quantize dense dense-w4a16
"""

import argparse
import io
from pathlib import Path

import pyarrow
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin.evaluation.check import check_checkpoint

CHUNK = 1 << 22


class Counter(io.RawIOBase):
    """Counts what is written to it and keeps nothing."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.size += len(data)
        return len(data)


def compressed(files: list[Path], codec: pyarrow.Codec) -> int:
    """Bytes of all files, each compressed by itself."""
    counter = Counter()
    sink = pyarrow.PythonFile(counter, "w")
    for path in files:
        stream = pyarrow.CompressedOutputStream(sink, codec)
        with path.open("rb") as source:
            while chunk := source.read(CHUNK):
                stream.write(chunk)
        stream.flush()
        total = counter.size
        stream = None
        total = max(total, counter.size)
    return total


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
    for name, level in (("gzip", 6), ("zstd", 3), ("zstd", zstd_level)):
        codec = pyarrow.Codec(name, compression_level=level)
        sizes.append(compressed(files, codec))
    cells = " | ".join(f"{size / 1e6:.1f}" for size in sizes)
    return f"| {directory.name} | {form} | {report.zeros:.3f} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--quantize", type=Path, nargs=2, metavar=("DENSE", "OUT"))
    parser.add_argument("--zstd-level", type=int, default=19)
    options = parser.parse_args()
    models = options.models
    if options.quantize:
        quantize(*options.quantize)
        models += [*options.quantize]
    level = options.zstd_level
    print(f"| model | format | zeros | MB | zlib 6 | zstd 3 | zstd {level} |")
    print("|---|---|---|---|---|---|---|")
    for directory in models:
        print(row(directory, level), flush=True)


if __name__ == "__main__":
    main()
