"""The budget step, shared by every allocator: plain arithmetic on arrays."""

import numpy as np

__all__ = ["check_budget", "meet_budget"]

# Sparsities are rounded to this many decimals: the pruners take int(columns * s), and
# 0.4999999999999999 would cost a weight in every row where 0.5 was meant.
DECIMALS = 10


def check_budget(sparsity: float, max_sparsity: float) -> None:
    """
    :raises ValueError: if no allocation under `max_sparsity` can reach `sparsity`
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity} must be in [0, 1)")
    if sparsity > max_sparsity:
        raise ValueError(
            f"sparsity={sparsity} cannot be met with max_sparsity={max_sparsity}: even "
            "with every block at the cap the model stays denser. Raise max_sparsity or "
            "lower the pruning modifier's sparsity."
        )


def meet_budget(
    sparsities: np.ndarray,
    parameters: np.ndarray,
    sparsity: float,
    max_sparsity: float = 1.0,
) -> np.ndarray:
    """
    Shift all blocks by one number, clip, and so meet Σ p_b·s_b = S·Σ p_b.

    The shift is found by bisection on a monotone function, so blocks with equal input
    stay equal and the order of blocks is kept.

    :param sparsities: finite wished-for sparsity per block, any range, shape (L,)
    :param parameters: p_b, number of prunable weights per block, shape (L,)
    :param sparsity: global target S in [0, max_sparsity]
    :param max_sparsity: upper bound of every s_b
    :return: s_b in [0, max_sparsity], weighted mean within 1e-9 of S, shape (L,)
    :raises ValueError: on non-finite input, empty blocks, or a budget that cannot be
        met
    """
    check_budget(sparsity, max_sparsity)
    wished = np.asarray(sparsities, dtype=np.float64)
    weights = np.asarray(parameters, dtype=np.float64)
    if wished.shape != weights.shape or wished.ndim != 1 or wished.size == 0:
        raise ValueError(
            f"sparsities {wished.shape} and parameters {weights.shape} must be equally "
            "long, non-empty vectors"
        )
    if not np.isfinite(wished).all():
        raise ValueError(f"sparsities must be finite, got {wished.tolist()}")
    if not (weights > 0).all():
        raise ValueError(f"parameters must be positive, got {weights.tolist()}")
    weights = weights / weights.sum()

    # Beyond max_sparsity + 1 apart nothing but the clipping survives; clamping the
    # range keeps the bisection exact for absurd inputs such as 1e300.
    center = float(np.clip(weights @ np.clip(wished, -1e6, 1e6), -1e6, 1e6))
    wished = np.clip(wished, center - 1e6, center + 1e6)

    def shifted(shift: float) -> np.ndarray:
        return np.clip(wished + shift, 0.0, max_sparsity)

    low = -float(wished.max())
    high = max_sparsity - float(wished.min())
    shift = sparsity - float(weights @ wished)
    if abs(float(weights @ shifted(shift)) - sparsity) > 1e-13:
        while True:
            shift = 0.5 * (low + high)
            if shift in (low, high):
                break
            if float(weights @ shifted(shift)) < sparsity:
                low = shift
            else:
                high = shift
        shift = high
    return np.minimum(np.round(shifted(shift), DECIMALS), max_sparsity)
