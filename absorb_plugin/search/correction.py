"""From a signal per group to a bounded change of its sparsity: plain mathematics."""

import math

import numpy as np

__all__ = [
    "corrected",
    "direction_from_ratio",
    "direction_from_response",
    "relative_slopes",
]

# A slope counts as at least a tenth and at most ten times the mean.
LARGEST_RATIO = 10.0


def direction_from_ratio(ratio: np.ndarray) -> np.ndarray:
    """
    u_l = clip(ln r_l, −ln 3, +ln 3); Δ_l = −(u_l − mean u)  (arXiv 2606.15161).

    :param ratio: amplification ratio r_l > 0 per block, shape (L,)
    :return: Δ, shape (L,): negative for amplifying blocks, which are protected
    :raises ValueError: if a ratio is not positive and finite
    """
    ratio = np.asarray(ratio, dtype=np.float64)
    if not (np.isfinite(ratio).all() and (ratio > 0).all()):
        raise ValueError(
            f"amplification ratios must be positive, got {ratio.tolist()}: choose "
            "another magnitude in signal_args (noise too small is lost in rounding, "
            "noise too large overflows), 1e-2 is a good start"
        )
    u = np.clip(np.log(ratio), -math.log(3.0), math.log(3.0))
    return -(u - u.mean())


def direction_from_response(response: np.ndarray) -> np.ndarray:
    """
    Δ = −(g − mean g), g winsorised at its 5 % and 95 % quantiles.

    :param response: slope of the loss per weight, or what a group's relief brings, (G,)
    :return: Δ, shape (G,): negative for those whose relief helps most
    :raises ValueError: if a response is not finite
    """
    response = _finite(response)
    g = np.clip(response, *np.quantile(response, [0.05, 0.95]))
    return -(g - g.mean())


def relative_slopes(slopes: np.ndarray, mean: float) -> np.ndarray:
    """
    ln(g / ḡ), clipped at ±ln 10. The loss grows about exponentially in a sparsity, and
    at the best allocation all slopes are equal: this is how far each has to go, up to a
    common factor, where the slopes themselves would move the steepest few and hardly
    touch the rest.

    :param slopes: g per weight, any shape; one that is not positive counts as ḡ / 10
    :param mean: ḡ, over all weights; where it is not positive that of |g| serves
    :raises ValueError: if a slope is not finite
    """
    slopes = _finite(slopes)
    scale = mean if mean > 0 else float(np.abs(slopes).mean())
    if scale == 0.0:
        return np.zeros_like(slopes)
    with np.errstate(over="ignore"):  # infinite is more than ten times the mean
        relative = slopes / scale
    return np.log(np.clip(relative, 1 / LARGEST_RATIO, LARGEST_RATIO))


def _finite(response: np.ndarray) -> np.ndarray:
    response = np.asarray(response, dtype=np.float64)
    if not np.isfinite(response).all():
        raise ValueError(
            f"the loss answers to changes of single groups by {response.tolist()}, but "
            "must be finite: check the weights after the blocks (final norm, lm_head) "
            "and the dtype (float16 overflows in some models, use bfloat16)"
        )
    return response


def corrected(base: np.ndarray, direction: np.ndarray, strength: float) -> np.ndarray:
    """
    s = base + β·Δ / max|Δ|: nothing moves by more than β before the budget step, which
    must follow (`Budget.meet`).

    :param base: an allocation, one sparsity per Linear, shape (N,)
    :param direction: Δ, shape (N,)
    :param strength: β, largest change of a sparsity; negative turns Δ round
    :return: shape (N,), not clipped
    """
    base = np.asarray(base, dtype=np.float64)
    direction = np.asarray(direction, dtype=np.float64)
    if base.shape != direction.shape:
        raise ValueError(f"base {base.shape} and direction {direction.shape} differ")
    largest = np.abs(direction).max()
    if largest == 0.0:
        return base.copy()
    return base + strength * (direction / largest)
