"""Means over samples of unequal length, and how well they are known."""

import numpy as np

__all__ = ["standard_error"]


def standard_error(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    Standard error over samples of the mean Σ sums / Σ counts, as of a ratio of sums.

    :param sums: per sample the sum over its tokens, shape (samples, ...)
    :param counts: per sample the number of its tokens, broadcastable to `sums`
    :return: shape (...); NaN for fewer than two samples, or where a sum is infinite
    """
    total, samples = counts.sum(axis=0), len(sums)
    if samples < 2:
        return np.full(sums.shape[1:], np.nan)
    with np.errstate(invalid="ignore"):  # an overflow is the worst of losses
        deviation = sums - counts * (sums.sum(axis=0) / total)
    return np.sqrt(samples / (samples - 1) * (deviation**2).sum(axis=0)) / total
