"""What a report says in words of what the profile has in numbers."""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from absorb_plugin.overflow import expm1

__all__ = ["allocation_name", "confirming", "counted", "gain_sentence", "judge_name"]
__all__ += ["model_name", "outcome_name", "plus_minus", "quality_found"]
__all__ += ["quality_sentence", "run_title", "start_was_kept"]

# Sparsities that differ by less are the same.
SAME = 1e-9
JUDGES = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "masks": "masks"}


def judge_name(judge: str) -> str:
    return JUDGES.get(judge, judge)


def allocation_name(profile: Mapping[str, Any], name: str) -> str:
    """The base allocation goes by the name of its allocator."""
    return profile["settings"]["allocator"] if name == "base" else name


def outcome_name(profile: Mapping[str, Any]) -> str:
    """What was taken: base allocator, "uniform", or the former and its correction."""
    base = profile["settings"]["allocator"]
    whole = "base" if profile["settings"]["strength"] == 0 else _uncorrected(profile)
    return f"{base} + absorption" if whole is None else allocation_name(profile, whole)


def _uncorrected(profile: Mapping[str, Any]) -> str | None:
    """ "base" or "uniform" if the outcome is one of them as it was."""
    chosen = (profile["confirmed"] or {}).get("chosen")
    if chosen in ("base", "uniform"):
        return chosen
    linears = [x for block in profile["blocks"] for x in block["linears"].values()]
    if all(abs(x["sparsity"] - x["base_sparsity"]) < SAME for x in linears):
        return "base"
    search = profile["search"]
    kept = search is not None and chosen != "halfway" and start_was_kept(search)
    return search["start"] if kept else None


def start_was_kept(search: Mapping[str, Any]) -> bool:
    """Whether the search took nothing of what it tried."""
    return not search["taken"] and not any(x["chosen"] for x in search["rounds"])


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


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
    return f"{counted(count, 'sample')} that chose {chose}"


def gain_sentence(profile: Mapping[str, Any]) -> str:
    """
    What the outcome gains on the base allocation; "" where that was not confirmed or
    the outcome is the base itself.
    """
    confirmed = profile["confirmed"]
    if not confirmed or confirmed["chosen"] == "base" or confirmed["gain"] is None:
        return ""
    gain, judge = confirmed["gain"], judge_name(confirmed["judge"])
    if (profile["quality"] or {}).get("quantization"):  # of older versions none
        judge += " and quantised"
    return (
        f"{plus_minus(abs(gain), confirmed['standard_error'])} nats per token "
        f"{'better' if gain >= 0 else 'worse'} than {profile['settings']['allocator']} "
        f"on {confirming(profile)}, judged by {judge}: "
        f"{abs(expm1(-gain)):.1%} {'lower' if gain >= 0 else 'higher'} perplexity."
    )


def quality_sentence(profile: Mapping[str, Any]) -> str:
    """What the sparsity found costs; "" where no quality was asked for."""
    found = quality_found(profile)
    if found is None:
        return ""
    bound = f"max_loss_increase is {found['max_loss_increase']:g}"
    increase, error = found["loss_increase"], found["standard_error"]
    if increase is None:
        return f"Sparsity {found['sparsity']:.1%} was found: {bound}."
    unit = "nats per token over the dense model"
    if error is not None:
        cost = f"{plus_minus(increase, error)} {unit}"
    else:
        cost = f"{increase:.3f} {unit}, by the allocation that the last comparison took"
    sparsity = f"Sparsity {found['sparsity']:.1%}"
    alone = found["quantization_loss_increase"]
    if alone is None:
        return f"{sparsity} was found. Pruning to it costs {cost}; {bound}."
    return (
        f"{sparsity} was found. Pruning to it and quantising cost {cost}, quantising "
        f"alone {alone:.3f}; {bound}."
    )


def quality_found(profile: Mapping[str, Any]) -> dict[str, float | None] | None:
    """
    What `max_loss_increase` came to; None where no quality was asked for.

    :return: "max_loss_increase", "sparsity", and in nats per token over the dense model
        "loss_increase" and its "standard_error", each None where it is not known: the
        last comparison, by the same judge, may have taken another allocation; and
        "quantization_loss_increase", what of it a quantisation that follows costs by
        itself, None where none does
    """
    quality = profile["quality"]
    if quality is None:
        return None
    found = {
        "max_loss_increase": quality["max_loss_increase"],
        "sparsity": quality["found"],
    }
    points = {point["sparsity"]: point for point in quality["curve"]}
    point = points.get(quality["found"])
    confirmed, increase, error = profile["confirmed"], None, None
    judged = ["searched"]
    if point is not None:
        increase, error = point["loss_increase"], point["standard_error"]
        judged.append(point.get("allocation", "searched"))
    if confirmed is not None and confirmed["chosen"] not in judged:
        losses = confirmed["losses"]
        searched, taken = losses["searched"], losses[confirmed["chosen"]]
        known = None not in (increase, searched, taken)
        if not (known and taken == searched):  # else the search came to the same
            increase, error = (increase + taken - searched if known else None), None
    quantization = quality.get("quantization") or {}  # of older versions none
    alone = quantization.get("loss_increase")
    found |= {"loss_increase": increase, "standard_error": error}
    return found | {"quantization_loss_increase": alone}


def model_name(profile: Mapping[str, Any]) -> str:
    model = profile["model"]
    return PurePath(model["name_or_path"]).name or model["class"]


def run_title(profile: Mapping[str, Any]) -> str:
    """Allocator, pruner and budget."""
    return (
        f"{outcome_name(profile)}, {profile['pruner']} at "
        f"{100 * profile['budget']:.3g}%"
    )
