"""
AlphaPruning: prune less where the spectrum of the weights has a heavy tail.

Three pure functions carry the numerics: `spectrum` (eigenvalues of WᵀW), `fit_tail`
(the power-law exponent α of such a spectrum) and `tail_exponent` (α of a weight by the
cheapest route that can be trusted).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from compressed_tensors.distributed import greedy_bin_packing
from pydantic import Field

from absorb_plugin import distributed
from absorb_plugin.names import Granularity
from absorb_plugin.precision import widest_float

from .base import Allocator, BaseAllocation, LinearGroup, Needs
from .base import LinearStatistics as Linear

__all__ = ["AlphaPruning", "TailFit", "fit_tail", "spectrum", "tail_exponent"]

Variant = Literal["peak", "mid"]

BINS = 100
# Eigenvalues below this part of the largest are zero: float32 singular values cannot
# tell them from rounding, and neither can α.
ZERO = 1e-13
# What a float32 Gram matrix and its float32 eigenvalues lose, as a part of the largest
# eigenvalue (2 to 5e-7 was measured on 4096 x 4096).
FLOAT32_NOISE = 1e-6
# α may be off by this much before the float64 route is taken instead.
TOLERANCE = 5e-4
# Below this side length float64 alone is as fast as float32 and a second look.
SMALL = 2048
# More eigenvalues than this in the float32 noise, and float64 it is.
CROWD = 32
# Elements of one chunk of the candidates x eigenvalues matrix (8 MiB in float64).
CHUNK = 1 << 20


@dataclass(frozen=True)
class TailFit:
    """
    :param alpha: the exponent α, NaN if fewer than two distinct positive eigenvalues
        leave nothing to fit
    :param start: x_min, the eigenvalue where the tail begins
    :param certain: whether an absolute error of `noise` in every eigenvalue but the
        smallest leaves α as it is
    """

    alpha: float
    start: float
    certain: bool


class AlphaPruning(Allocator):
    """
    AlphaPruning (https://arxiv.org/abs/2410.10912): per Linear the exponent α of a
    power law fitted to the tail of the eigenvalues of WᵀW, per block the mean α.
    r_b = (1−ε) + 2ε·(α_b − min α)/(max α − min α) and s_b = r_b·S·Σp/Σ(p·r): a small α
    is a heavy tail, a well trained block, and pruned less.

    The authors do not clip s_b; here it is clipped to [0, 1] and the budget step
    redistributes the rest. A Linear without a spectrum to fit (all zero, rank one)
    takes the mean of the others in its group, a group without any the mean of the
    groups.

    :param epsilon: ε, half the spread of r around 1, in [0, 1]
    :param variant: where the tail begins: "peak" searches around the fullest bin of the
        logarithmic histogram, "mid" takes the upper half of the eigenvalues
    """

    name: ClassVar[str] = "alpha_pruning"
    needs: ClassVar[Needs] = "weights"
    granularities: ClassVar[tuple[Granularity, ...]] = ("block", "linear")
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10912"
    cost: ClassVar[str] = "no forward pass; the eigenvalues of every Linear"

    epsilon: float = Field(default=0.3, ge=0.0, le=1.0, allow_inf_nan=False)
    variant: Variant = "peak"

    def allocate(
        self, groups: Sequence[LinearGroup], sparsity: float
    ) -> BaseAllocation:
        linears = [x for group in groups for x in group.linears.values()]
        found = iter(_exponents(linears, self.variant))
        alphas = [{name: next(found) for name in group.linears} for group in groups]
        metric = np.array([_mean(list(group.values())) for group in alphas])
        metric = _fill(metric)
        linear_metrics = tuple(
            {name: a if np.isfinite(a) else float(mean) for name, a in group.items()}
            for group, mean in zip(alphas, metric, strict=True)
        )
        parameters = np.array([group.parameters for group in groups], dtype=np.float64)
        spread = float(metric.max() - metric.min())
        ratio = np.ones_like(metric)
        if spread > 0:
            position = (metric - metric.min()) / spread
            ratio = (1 - self.epsilon) + 2 * self.epsilon * position
        total = float((parameters * ratio).sum())
        # total is 0 only for ε = 1 with all parameters at the smallest α
        base = ratio * sparsity * parameters.sum() / total if total > 0 else ratio * 0
        if spread == 0:
            base = np.full_like(metric, sparsity)
        return BaseAllocation(metric, np.clip(base, 0.0, 1.0), linear_metrics)


def _exponents(linears: list[Linear], variant: Variant) -> list[float]:
    """
    α of every Linear. Under torch.distributed each is computed by one rank and told to
    the others: ranks of unequal hardware must not prune by unequal α.
    """
    if not distributed.active():
        return [_exponent(linear, variant) for linear in linears]
    # every rank packs the same sizes, and so comes to the same shares
    _, shares, _ = greedy_bin_packing(
        list(range(len(linears))), distributed.ranks(), lambda i: _work(linears[i])
    )
    with distributed.fail_together():
        own = shares[distributed.rank()]
        mine = {i: _exponent(linears[i], variant) for i in own}
    every = {i: alpha for part in distributed.gather(mine) for i, alpha in part.items()}
    return [every[i] for i in range(len(linears))]


def _exponent(linear: Linear, variant: Variant) -> float:
    return linear.remember(
        f"alpha {variant}", lambda: tail_exponent(linear.weight, variant)
    )


def _work(linear: Linear) -> int:
    """Multiplications of the Gram matrix, as a measure of the time α takes."""
    # not weight.shape: reading a weight may onload it
    assert isinstance(linear.module, torch.nn.Linear)
    rows, columns = linear.module.out_features, linear.module.in_features
    return rows * columns * min(rows, columns)


def tail_exponent(weight: torch.Tensor, variant: Variant = "peak") -> float:
    """
    α of one weight matrix, within 1e-3 of the α of its float32 singular values.

    On the CPU, where a matrix goes whose device has no float64, a large one first gets
    a float32 Gram matrix, whose error matters for the small eigenvalues alone: of those
    the fit needs only the smallest (an end of the histogram), which is then refined.
    Where that does not settle α, and on any other device, Gram matrix and eigenvalues
    are float64.

    :param weight: shape (out_features, in_features), any floating dtype and device
    :param variant: see `AlphaPruning`
    :return: α, NaN if there is nothing to fit
    """
    tall = weight.detach().float()
    if widest_float(tall.device) != torch.float64:
        tall = tall.cpu()
    tall = tall if tall.shape[0] >= tall.shape[1] else tall.T
    largest = float(tall.abs().max()) if tall.numel() else 0.0
    if not np.isfinite(largest):
        raise ValueError("the weights hold NaN or infinity; α has no meaning then")
    if largest == 0.0:
        return float("nan")
    # Squares cannot under- or overflow in float32 now. The fit gets the scale back, as
    # the authors' lower bound compares a logarithm with an eigenvalue.
    tall, scale = tall / largest, largest**2
    if tall.device.type == "cpu" and tall.shape[1] >= SMALL:
        eigenvalues = _spectrum_float32(tall)
        if eigenvalues is not None:
            noise = FLOAT32_NOISE * float(eigenvalues[-1]) * scale
            fit = fit_tail(eigenvalues * scale, variant, noise)
            if fit.certain:
                return fit.alpha
    return fit_tail(spectrum(tall) * scale, variant).alpha


def spectrum(weight: torch.Tensor) -> torch.Tensor:
    """
    The positive eigenvalues of WᵀW by way of the smaller float64 Gram matrix.

    :param weight: shape (m, n), float32 or narrower
    :return: ascending, float64, shape (rank,)
    """
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    eigenvalues = torch.linalg.eigvalsh(_gram(tall, torch.float64))
    return eigenvalues[eigenvalues > ZERO * eigenvalues[-1]]


def fit_tail(
    eigenvalues: torch.Tensor, variant: Variant = "peak", noise: float = 0.0
) -> TailFit:
    """
    The power law of the tail (https://arxiv.org/abs/2410.10912, Hill estimator).

    A tail that begins at index i holds n = N−i values and has
    α_i = 1 + n/(Σ_{k≥i} ln e_k − n·ln e_i). "mid" takes i = N//2. "peak" takes, among
    the i < N−1 with log10(0.95·x̂) ≤ e_i ≤ 1.5·x̂, the one with the least
    Kolmogorov-Smirnov distance KS_i = max_k |1 − (e_k/e_i)^{1−α_i} − (k−i)/n|; x̂ is the
    left edge of the fullest of 100 bins of log10 e. The log10 in the lower bound is the
    authors'. Where no e_i lies in that range, the first above x̂ is taken.

    :param eigenvalues: positive and ascending, shape (N,)
    :param variant: "peak" or "mid"
    :param noise: absolute error of the eigenvalues; decides on `TailFit.certain`
    """
    log_e = eigenvalues.double().log()
    count = log_e.numel()
    if count < 2 or bool(log_e[0] == log_e[-1]):
        return TailFit(float("nan"), float("nan"), noise == 0.0)
    index = torch.arange(count, device=log_e.device)
    size = (count - index).double()
    excess = log_e.flip(0).cumsum(0).flip(0) - size * log_e
    # Ties at the top (and i = N−1) leave no excess: no power law begins there.
    usable = excess > 1e-12 * size
    alphas = 1 + size / torch.where(usable, excess, torch.inf)
    if variant == "mid":
        start = min(count // 2, int(usable.nonzero()[-1]))
        return _certify(alphas, log_e, start, noise)

    low, high = log_e[0], log_e[-1]
    edges = torch.lerp(low, high, torch.linspace(0, 1, BINS + 1).to(log_e))
    edges[-1] = torch.inf
    bins = torch.searchsorted(log_e, edges)
    bins[0] = 0
    log_peak = float(edges[int(bins.diff().argmax())])
    e = log_e.exp()
    lower = np.log10(0.95) + log_peak / np.log(10)
    inside = usable & (e >= lower) & (log_e <= np.log(1.5) + log_peak)
    candidates = inside.nonzero().flatten()
    if candidates.numel() == 0:  # a peak in a wide bin, with a gap below it
        first = int((log_e < log_peak).sum())
        candidates = usable.nonzero().flatten().clamp(max=first)[-1:]
    distances = _distances(log_e, alphas, candidates)
    best = int(distances.argmin())
    fit = _certify(alphas, log_e, int(candidates[best]), noise)
    if not fit.certain or noise == 0.0:
        return fit
    # Candidates whose own eigenvalue is in doubt must be clearly worse to be ignored.
    doubtful = e[candidates] * TOLERANCE < noise
    rival = bool((distances[doubtful] < 2 * distances[best]).any())
    return TailFit(fit.alpha, fit.start, not rival)


def _certify(
    alphas: torch.Tensor, log_e: torch.Tensor, start: int, noise: float
) -> TailFit:
    """dα = (α−1)²·d(ln e_i), and d(ln e_i) = noise/e_i, the rest of the sum less."""
    alpha, smallest = float(alphas[start]), float(log_e[start].exp())
    error = (alpha - 1) ** 2 * noise / smallest
    return TailFit(alpha, smallest, error <= TOLERANCE)


def _distances(
    log_e: torch.Tensor, alphas: torch.Tensor, candidates: torch.Tensor
) -> torch.Tensor:
    """KS_i of every candidate i, shape (C,), in chunks of the C x N matrix."""
    count = log_e.numel()
    index = torch.arange(count, device=log_e.device)
    parts = []
    for chunk in candidates.split(max(1, CHUNK // count)):
        i, first = chunk[:, None], int(chunk[0])
        # Before the tail (k < i) both terms are clamped to 0 and add nothing; before
        # the first tail of the chunk they need not be computed.
        ratio = (log_e[first:] - log_e[i]).clamp_(min=0)
        fitted = torch.expm1(ratio.mul_(1 - alphas[i]))
        empirical = ((index[first:] - i) / (count - i)).clamp_(min=0)
        parts.append(fitted.add_(empirical).abs_().amax(dim=1))
    return torch.cat(parts)


def _gram(tall: torch.Tensor, dtype: torch.dtype, parts: int = 8) -> torch.Tensor:
    """
    Lower triangle of WᵀW, shape (n, n), at 9/16 of the multiplications; what lies above
    the diagonal blocks is left zero (LAPACK reads the lower triangle alone).
    """
    columns = tall.shape[1]
    gram = tall.new_zeros((columns, columns), dtype=dtype)
    step = -(-columns // parts)
    # Rows are converted a slice at a time: a float64 copy of W is never whole.
    for rows in tall.split(4096):
        rows = rows.to(dtype)
        for low in range(0, columns, step):
            high = min(low + step, columns)
            gram[low:high, :high].addmm_(rows[:, low:high].T, rows[:, :high])
    return gram


def _spectrum_float32(tall: torch.Tensor) -> torch.Tensor | None:
    """
    Eigenvalues of WᵀW from float32, the smallest refined: good to `FLOAT32_NOISE` of
    the largest, the smallest to about 1e-5 of itself. None where it cannot be refined.

    :param tall: float32, shape (m, n), m >= n
    :return: positive, ascending, float64, shape (n,)
    """
    gram = _gram(tall, torch.float32)
    eigenvalues = torch.linalg.eigvalsh(gram).double()
    noise = FLOAT32_NOISE * float(eigenvalues[-1])
    # All of the spectrum is good to 1e-4 of itself, as singular values would be.
    if float(eigenvalues[0]) > 1e4 * noise:
        return eigenvalues
    # A crowd near zero would be slow to tell apart, and leaves α in doubt anyway.
    if int((eigenvalues < 16 * noise).sum()) > CROWD:
        return None
    smallest = _smallest_eigenvalue(tall, gram, 2 * noise)
    if smallest is None or smallest <= ZERO * float(eigenvalues[-1]):
        return None
    return eigenvalues.clamp_(min=smallest).index_fill_(
        0, torch.tensor([0], device=tall.device), smallest
    )


def _smallest_eigenvalue(
    tall: torch.Tensor, gram: torch.Tensor, shift: float, block: int = 16
) -> float | None:
    """
    Smallest eigenvalue of WᵀW by LOBPCG (https://doi.org/10.1137/S1064827500366124):
    float64 products with W itself, preconditioned by a float32 Cholesky factor of the
    Gram matrix, shifted by more than its rounding errors. torch.lobpcg wants a matrix,
    and WᵀW in float64 is what this is here to avoid.

    :param tall: float32, shape (m, n)
    :param gram: lower triangle of the float32 Gram matrix, shape (n, n); overwritten
    :param shift: added to its diagonal
    :return: the eigenvalue, None if it did not converge
    """
    gram.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return None
    weight = tall.double()
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(tall.shape[1], block, generator=generator)
    basis = _solve(factor, basis).double()
    previous = None
    for _ in range(40):
        basis = torch.linalg.qr(basis).Q
        image = (basis.T @ weight.T).T  # a few rows from the left: twice as fast
        ritz, mix = torch.linalg.eigh(image.T @ image)
        ritz, mix = ritz[:block], mix[:, :block]
        vectors = basis @ mix
        residual = ((image @ mix).T @ weight).T - vectors * ritz
        smallest = float(ritz[0])
        # The eigenvalue's own error is the square of this over the gap to the next.
        if float(residual[:, 0].norm()) <= 3e-3 * smallest:
            return smallest
        search = _solve(factor, residual.float()).double()
        parts = [vectors, search / search.norm(dim=0)]
        if previous is not None:
            parts.append(vectors - previous @ (previous.T @ vectors))
        previous = vectors
        basis = torch.cat(parts, dim=1)
    return None


def _solve(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """As torch.cholesky_solve, which copies the factor at every call."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True)


def _mean(alphas: list[float]) -> float:
    known = [alpha for alpha in alphas if np.isfinite(alpha)]
    return float(np.mean(known)) if known else float("nan")


def _fill(metric: np.ndarray) -> np.ndarray:
    """NaN becomes the mean of the rest, and 1, the lightest α, if there is no rest."""
    known = np.isfinite(metric)
    return np.where(known, metric, metric[known].mean() if known.any() else 1.0)
