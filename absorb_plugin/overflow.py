"""
exp as a model that was ruined needs it: a loss above 709 nats per token has a
perplexity beyond the largest float, and that is no error.
"""

import math

__all__ = ["exp", "expm1"]


def exp(x: float) -> float:
    """Infinite where it overflows."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def expm1(x: float) -> float:
    """Infinite where it overflows."""
    try:
        return math.expm1(x)
    except OverflowError:
        return math.inf
