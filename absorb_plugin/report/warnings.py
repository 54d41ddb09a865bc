"""What a reader of a report should be told before he trusts its numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absorb_plugin.blocks import MUCH
from absorb_plugin.groups import group_name
from absorb_plugin.report.words import (
    allocation_name,
    judge_name,
    plus_minus,
    start_was_kept,
)
from absorb_plugin.signals.noise import FLOOR_MARGIN

__all__ = ["TOLERANCE", "find_warnings"]

Profile = Mapping[str, Any]

# Wanda leaves up to one weight per row too many: 1/576 in a small model.
TOLERANCE = 5e-3
# Of rows of 50 columns it may take none where less is asked for.
LESS_THAN_ONE = 2e-2
NAMED = 4


def find_warnings(profile: Profile) -> list[str]:
    """
    :param profile: content of profile.json
    :return: sentences, each about something that is not as one would expect
    """
    parts = (
        _correction,
        _not_confirmed,
        _uncertain,
        _noise,
        _cap,
        _unfinished,
        _unseen,
        _dense,
        _other,
        _missed,
        _filled,
    )
    return [sentence for part in parts if (sentence := part(profile))]


def _correction(profile: Profile) -> str:
    base = profile["settings"]["allocator"]
    if profile["settings"]["strength"] == 0:
        return f"strength is 0 in the recipe: this is {base} alone, uncorrected."
    if _one_group(profile):
        return _nothing_to_correct(profile)
    search = profile["search"]
    if search is None:
        return ""
    kept = start_was_kept(search)
    confirmed = profile["confirmed"] or {}
    chosen = confirmed.get("chosen")
    if confirmed.get("anew"):
        start = "uniform" if search["start"] == "uniform" else base
        end = f"The outcome that did better started from {start}"
        if chosen in ("base", "uniform"):
            end = f"Neither outcome did better than {allocation_name(profile, chosen)}"
        return (
            "The pruner's own arithmetic clearly preferred another start than masks "
            f"did, so the search was run once more from there. {end}."
        )
    if search["start"] == "uniform":
        whole = kept and chosen in (None, "searched", "uniform")
        return _started_from_uniform(search, base, whole)
    if chosen not in (None, "searched", "base"):
        return ""  # what was taken in its place is said there
    if kept and not search["steps"] and not search["rounds"]:
        return "The base allocation was kept: the slopes gave nothing to correct."
    if kept:
        return (
            "The base allocation was kept: no correction beat it on the held-out "
            "samples by more than their standard error."
        )
    return ""


def _one_group(profile: Profile) -> bool:
    level, blocks = profile["level"], profile["blocks"]
    groups = {
        group_name(level, x["name"], name) for x in blocks for name in x["linears"]
    }
    return len(groups) == 1


def _nothing_to_correct(profile: Profile) -> str:
    apart = sum(len(block["linears"]) for block in profile["blocks"]) > 1
    more = " level: linear corrects each Linear." if apart else ""
    return (
        f"Nothing could be corrected: at level {profile['level']} all that is pruned "
        f"is one group, which has to meet the budget by itself.{more}"
    )


def _started_from_uniform(search: Mapping[str, Any], base: str, kept: bool) -> str:
    losses = (search[f"{name}_loss"] for name in ("uniform", "base"))
    uniform, other = ("overflow" if x is None else f"{x:.3f}" for x in losses)
    more = " and nothing beat it: this is a uniform allocation" if kept else ""
    return (
        f"Uniform beat {base} on the held-out samples ({uniform} against {other} "
        f"nats), so the correction started from uniform{more}."
    )


def _not_confirmed(profile: Profile) -> str:
    """What the search found was not taken."""
    confirmed = profile["confirmed"]
    if not confirmed or "searched" not in confirmed["losses"]:
        return ""
    chosen = confirmed["chosen"]
    told = confirmed["losses"]
    if told[chosen] == told["searched"]:  # it may be base or uniform itself
        return ""
    losses = ", ".join(
        f"{name} {loss:.3f}"
        for name, loss in confirmed["losses"].items()
        if loss is not None
    )
    taken = {"halfway": "halfway to what the search had found", "uniform": "uniform"}
    name = taken.get(chosen, f"that of {allocation_name(profile, chosen)} alone")
    search = profile["search"]
    if search is not None and start_was_kept(search):
        starts = ("base", "uniform")
        kept, other = (
            allocation_name(profile, one)
            for one in (starts if search["start"] == "base" else starts[::-1])
        )
        name = f"halfway between {kept} and {other}" if chosen == "halfway" else name
        return (
            f"No correction beat {kept} under masks. Judged by "
            f"{judge_name(confirmed['judge'])}, it was not the best (nats: {losses}), "
            f"so the allocation is {name}."
        )
    return (
        f"Judged by {judge_name(confirmed['judge'])}, what the search had found did "
        f"not hold (nats: {losses}), so the allocation is {name}."
    )


def _uncertain(profile: Profile) -> str:
    confirmed = profile["confirmed"]
    gain, error = (confirmed or {}).get("gain"), (confirmed or {}).get("standard_error")
    if gain is None or error is None or abs(gain) >= error or gain == 0:
        return ""
    return (
        f"The gain, {plus_minus(gain, error)} nats per token, is within its standard "
        "error: more calibration samples would tell whether there is one."
    )


def _noise(profile: Profile) -> str:
    noise = profile["noise"]
    floor = noise and noise["floor"][-1]
    if not floor or noise["magnitude"] >= FLOOR_MARGIN * floor:
        return ""
    return (
        f"The noise, η = {noise['magnitude']:g}, is less than {FLOOR_MARGIN:g} times "
        f"the rounding floor of {floor:.1e}: the ratios r are partly arithmetic."
    )


def _cap(profile: Profile) -> str:
    cap = profile["settings"]["max_sparsity"]
    full = [block for block in profile["blocks"] if _at(block, cap)]
    names = [block["name"] for block in full]
    names += _linears(
        [block for block in profile["blocks"] if not _at(block, cap)],
        lambda linear: _at(linear, cap),
    )
    if not names:
        return ""
    return f"At the cap, max_sparsity {cap:g}: {_listed(names)}."


def _at(entry: Mapping[str, Any], cap: float) -> bool:
    return entry["sparsity"] > cap - 1e-6


def _linears(blocks: Iterable[Mapping[str, Any]], holds: Any) -> list[str]:
    """Full names of the Linears of which `holds` is true."""
    return [
        f"{block['name']}.{short}"
        for block in blocks
        for short, linear in block["linears"].items()
        if holds(linear)
    ]


def _unfinished(profile: Profile) -> str:
    if profile["realised"] is not None:
        return ""
    return "Written before pruning was finished: the realised sparsity is not known."


def _unseen(profile: Profile) -> str:
    unseen = profile["unseen_linears"]
    if not unseen:
        return ""
    return (
        f"Saw no token when the statistics were taken: {_listed(unseen)}. Where the "
        "pruner has none for them either, it prunes an expert blindly and leaves a "
        "Linear that is not called dense; more calibration samples help experts."
    )


def _dense(profile: Profile) -> str:
    known = set(profile["unseen_linears"] or ())
    dense = _linears(
        profile["blocks"],
        lambda x: x["realised_sparsity"] == 0 and x["sparsity"] > LESS_THAN_ONE,
    )
    dense = [name for name in dense if name not in known]
    if not dense:
        return ""
    return f"Left dense although a share was to go: {_listed(dense)}."


def _other(profile: Profile) -> str:
    other = profile["other_weights"]
    if (share := sum(other.values())) <= MUCH:
        return ""
    return (
        f"{share:.0%} of the blocks' weights are in no Linear "
        f"({', '.join(other)}) and stay dense: the sparsity is that of the Linears."
    )


def _missed(profile: Profile) -> str:
    realised, budget = profile["realised"], profile["budget"]
    if realised is None or abs(realised - budget) <= TOLERANCE:
        return ""
    return f"{realised:.4f} of the weights are zero, {budget:.4f} were asked for."


def _filled(profile: Profile) -> str:
    lost = profile["zeros_lost"]
    if not lost:
        return ""
    return (
        f"{lost:.2%} of the zeros that pruning made were filled by a later modifier of "
        "the recipe: put what changes weights before the pruning modifier, or check "
        "that it preserves zeros."
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
