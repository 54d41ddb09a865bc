"""
The allocators once more, written from the papers' formulas with loops and float32
singular values, and sharing nothing with the package: what parity is tested against.
"""

import math
from collections.abc import Callable

import numpy as np
import torch


def reference_alpha(weight: torch.Tensor, variant: str = "peak") -> float:
    """α of AlphaPruning from float32 svdvals, one eigenvalue after the other."""
    singular = torch.linalg.svdvals(weight.float())
    return reference_tail(singular.double().square().sort().values.tolist(), variant)


def reference_tail(e: list[float], variant: str = "peak") -> float:
    count = len(e)
    logs = [math.log(x) for x in e]

    def alpha(i: int) -> float:
        n = count - i
        return 1 + n / (sum(logs[i:]) - n * logs[i])

    def distance(i: int, exponent: float) -> float:
        n = count - i
        return max(
            abs(1 - (e[i + k] / e[i]) ** (1 - exponent) - k / n) for k in range(n)
        )

    if variant == "mid":
        return alpha(count // 2)
    log10 = np.log10(np.array(e))
    heights, edges = np.histogram(log10, bins=100)
    peak = 10 ** edges[int(heights.argmax())]
    best, least = math.nan, math.inf
    for i in range(count - 1):
        if not math.log10(0.95 * peak) <= e[i] <= 1.5 * peak:
            continue
        exponent = alpha(i)
        if (d := distance(i, exponent)) < least:
            best, least = exponent, d
    return best


def reference_alpha_pruning(
    alphas: list[float], parameters: list[int], sparsity: float, epsilon: float
) -> list[float]:
    low, high = min(alphas), max(alphas)
    r = [(1 - epsilon) + 2 * epsilon * (a - low) / (high - low) for a in alphas]
    scale = sum(p * x for p, x in zip(parameters, r, strict=True)) / sum(parameters)
    return [x * sparsity / scale for x in r]


def importances(
    weights: list[torch.Tensor], square_sums: list[torch.Tensor]
) -> torch.Tensor:
    """M_b: all |W|·√a of one group in one vector."""
    pairs = zip(weights, square_sums, strict=True)
    return torch.cat(
        [(w.float().abs() * a.sqrt()).double().flatten() for w, a in pairs]
    )


def reference_owl(
    pooled: list[torch.Tensor], sparsity: float, m: float, lmbda: float
) -> tuple[list[float], list[float]]:
    percent = [100 * float((x > m * x.mean()).double().mean()) for x in pooled]
    return percent, _spread(percent, sparsity, lmbda)


def reference_dlp(
    pooled: list[torch.Tensor],
    sparsity: float,
    alpha: float,
    reduce: Callable[[torch.Tensor], torch.Tensor] = torch.mean,
) -> tuple[list[float], list[float]]:
    means = [float(reduce(x)) for x in pooled]
    q = [1 - mean / sum(means) for mean in means]
    return q, _spread(q, sparsity, alpha)


def reference_reconstruction(
    weight: torch.Tensor, inputs: torch.Tensor, fraction: float, group_size: int
) -> tuple[float, torch.Tensor]:
    """
    Error and pruned weight of LSA's greedy removal, without a Gram matrix: the output
    that was lost is computed for every weight that could go next.
    """
    x, error = inputs.double(), 0.0
    kept = weight.double().clone()
    for row in kept:
        lost = torch.zeros(len(x), dtype=torch.float64)
        for start in range(0, len(row), group_size):
            left = list(range(start, min(start + group_size, len(row))))
            for _ in range(int(len(left) * fraction)):
                sizes = [float((lost + row[j] * x[:, j]).square().sum()) for j in left]
                chosen = left.pop(sizes.index(min(sizes)))
                lost = lost + row[chosen] * x[:, chosen]
                row[chosen] = 0.0
        error += float(lost.square().sum())
    return error, kept.to(weight.dtype)


def reference_lsa(
    errors: list[list[float]], parameters: list[int], sparsity: float, beta: float
) -> tuple[list[float], list[float]]:
    """As the authors write it where projections share one budget, by weights pruned."""
    means = [sum(one) / len(one) for one in errors]
    importance = [1 - mean / sum(means) for mean in means]
    low, high = min(importance), max(importance)
    d = [2 * beta * (x - low) / (high - low) for x in importance]
    size, middle = sum(parameters) / len(parameters), sum(d) / len(d)
    pruned = [
        n * sparsity + (middle - x) * size for n, x in zip(parameters, d, strict=True)
    ]
    return means, [x / n for x, n in zip(pruned, parameters, strict=True)]


def reference_atp(blocks: int, sparsity: float, beta: float) -> list[float]:
    return [sparsity - beta * (blocks - 1) / 2 + b * beta for b in range(blocks)]


def _spread(metric: list[float], sparsity: float, width: float) -> list[float]:
    low, high = min(metric), max(metric)
    u = [2 * width * (x - low) / (high - low) for x in metric]
    mean = sum(u) / len(u)
    return [1 - (x - mean + 1 - sparsity) for x in u]
