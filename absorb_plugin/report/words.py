"""What a report says in words of what the profile has in numbers."""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from absorb_plugin.overflow import expm1

__all__ = ["allocation_name", "confirming", "gain_sentence", "judge_name"]
__all__ += ["model_name", "plus_minus", "quality_sentence", "run_title"]

JUDGES = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "masks": "masks"}


def judge_name(judge: str) -> str:
    return JUDGES.get(judge, judge)


def allocation_name(profile: Mapping[str, Any], name: str) -> str:
    """The base allocation goes by the name of its allocator."""
    return profile["settings"]["allocator"] if name == "base" else name


def plus_minus(value: float, error: float | None) -> str:
    """
    :return: with the digits that the error leaves, two at least
    """
    if error is None or not error > 0:
        return f"{value:.2f}"
    digits = max(2, -math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def confirming(profile: Mapping[str, Any]) -> str:
    """The samples of the last comparison."""
    count = sum(x["samples"] for x in profile["samples"] if x["use"] == "confirm")
    chose = "nothing" if profile["confirmed"]["chose_nothing"] else "it too"
    return f"{count} samples that chose {chose}"


def gain_sentence(profile: Mapping[str, Any]) -> str:
    """
    What the outcome gains on the base allocation; "" where that was not confirmed or
    the outcome is the base itself.
    """
    confirmed = profile["confirmed"]
    if not confirmed or confirmed["chosen"] == "base" or confirmed["gain"] is None:
        return ""
    gain = confirmed["gain"]
    return (
        f"{plus_minus(abs(gain), confirmed['standard_error'])} nats per token "
        f"{'better' if gain >= 0 else 'worse'} than {profile['settings']['allocator']} "
        f"on {confirming(profile)}, judged by {judge_name(confirmed['judge'])}: "
        f"{abs(expm1(-gain)):.1%} {'lower' if gain >= 0 else 'higher'} perplexity."
    )


def quality_sentence(profile: Mapping[str, Any]) -> str:
    """What the sparsity found costs; "" where no quality was asked for."""
    quality = profile["quality"]
    if quality is None:
        return ""
    bound = f"max_loss_increase is {quality['max_loss_increase']:g}"
    points = {point["sparsity"]: point for point in quality["curve"]}
    point = points.get(quality["found"])
    if point is None:
        return f"Sparsity {quality['found']:.1%} was found: {bound}."
    cost = plus_minus(point["loss_increase"], point["standard_error"])
    return (
        f"Sparsity {quality['found']:.1%} was found. It costs {cost} nats per token "
        f"over the dense model; {bound}."
    )


def model_name(profile: Mapping[str, Any]) -> str:
    model = profile["model"]
    return PurePath(model["name_or_path"]).name or model["class"]


def run_title(profile: Mapping[str, Any]) -> str:
    """Allocator, pruner and budget."""
    settings = profile["settings"]
    corrected = " + absorption" if settings["strength"] != 0 else ""
    return (
        f"{settings['allocator']}{corrected}, {profile['pruner']} at "
        f"{100 * profile['budget']:.3g}%"
    )
