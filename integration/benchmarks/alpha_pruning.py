"""
Time AlphaPruning's α against a plain implementation of its formula: float32 singular
values and a Python loop over the eigenvalues, in the same run, on the same matrices.

    python integration/benchmarks/alpha_pruning.py
    python integration/benchmarks/alpha_pruning.py --sizes 1024x1024 --threads 2
    python integration/benchmarks/alpha_pruning.py --model path/to/model --sizes

Each row is one matrix (for a model: all Linears of one shape in its decoder blocks).
The ratio is plain/fast; "error" is the largest |Δα|, "float64" how many matrices the
fast route had to do in float64.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from absorb_plugin.allocators import alpha_pruning

SIZES = ["4096x4096", "11008x4096"]


def plain_alpha(weight: torch.Tensor, variant: str) -> float:
    """α as https://arxiv.org/abs/2410.10912 states it, one eigenvalue at a time."""
    e = torch.linalg.svdvals(weight.float()).square().sort().values
    log_e, count = e.log(), e.numel()

    def alpha(i: int) -> torch.Tensor:
        n = count - i
        return 1 + n / (log_e[i:].sum() - n * log_e[i])

    if variant == "mid":
        return float(alpha(count // 2))
    log10 = e.log10()
    low, high = float(log10[0]), float(log10[-1])
    heights = torch.histc(log10.cpu(), 100, min=low, max=high)
    peak = 10 ** torch.linspace(low, high, 101)[heights.argmax()].to(e.device)
    lower, upper = (0.95 * peak).log10(), 1.5 * peak
    best, least = float("nan"), float("inf")
    for i in range(count - 1):
        if e[i] < lower:
            continue
        if e[i] > upper:
            break
        exponent = alpha(i)
        n = count - i
        steps = torch.arange(n, device=e.device) / n
        fitted = 1 - (e[i:] / e[i]) ** (1 - exponent)
        distance = float((fitted - steps).abs().max())
        if distance < least:
            best, least = float(exponent), distance
    return best


def timed(run: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Result and seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


@contextmanager
def count_float64() -> Iterator[list[int]]:
    """Number of calls of the float64 route while the context is open."""
    calls = [0]
    spectrum = alpha_pruning.spectrum

    def counted(weight: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return spectrum(weight)

    alpha_pruning.spectrum = counted
    try:
        yield calls
    finally:
        alpha_pruning.spectrum = spectrum


def compare(
    weights: list[torch.Tensor], variant: Any, device: torch.device
) -> tuple[float, float, float, int]:
    """Seconds plain, seconds fast, largest |Δα|, matrices done in float64."""
    plain_seconds = fast_seconds = error = 0.0
    with count_float64() as calls:
        for weight in weights:
            weight = weight.to(device)
            fast, seconds = timed(
                partial(alpha_pruning.tail_exponent, weight, variant), device
            )
            fast_seconds += seconds
            plain, seconds = timed(partial(plain_alpha, weight, variant), device)
            plain_seconds += seconds
            error = max(error, abs(fast - plain))
    return plain_seconds, fast_seconds, error, calls[0]


def cases(sizes: list[str], model: Path | None) -> dict[str, list[torch.Tensor]]:
    """Label -> matrices."""
    found: dict[str, list[torch.Tensor]] = {}
    for size in sizes:
        rows, columns = map(int, size.split("x"))
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, columns, generator=generator)
        found[f"random {size}"] = [0.02 * weight]
    if model is not None:
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(model)
        blocks = network.get_decoder().layers
        for module in blocks.modules():
            if isinstance(module, torch.nn.Linear):
                rows, columns = module.weight.shape
                label = f"{model.name} {rows}x{columns}"
                found.setdefault(label, []).append(module.weight.detach())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--sizes", nargs="*", default=SIZES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--model", type=Path, help="directory of a model")
    parser.add_argument("--variant", choices=["peak", "mid"], default="peak")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="default: torch's own")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    # LAPACK and the thread pool wake up outside the clock
    compare([torch.randn(64, 64)], arguments.variant, arguments.device)
    table = Table(title=f"α ({arguments.variant}) on {arguments.device}")
    for column in ("matrices", "n", "plain s", "fast s", "ratio", "error", "float64"):
        table.add_column(column, justify="left" if column == "matrices" else "right")
    for label, weights in cases(arguments.sizes, arguments.model).items():
        plain, fast, error, float64 = compare(
            weights, arguments.variant, arguments.device
        )
        table.add_row(
            label,
            str(len(weights)),
            f"{plain:.2f}",
            f"{fast:.2f}",
            f"{plain / fast:.1f}",
            f"{error:.1e}",
            str(float64),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
