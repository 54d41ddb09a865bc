"""What a reader of a report should be told before he trusts its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from absorb_plugin.signals.noise import FLOOR_MARGIN

__all__ = ["findings"]

# Wanda leaves up to one weight per row too many: 1/576 in a small model.
TOLERANCE = 5e-3
NAMED = 4


def findings(profile: Mapping[str, Any]) -> list[str]:
    """
    :param profile: from `Report.profile`
    :return: sentences, each about something that is not as one would expect
    """
    parts = (
        _correction,
        _rehearsal,
        _noise,
        _cap,
        _unfinished,
        _unseen,
        _dense,
        _missed,
    )
    return [sentence for part in parts if (sentence := part(profile))]


def _correction(profile: Mapping[str, Any]) -> str:
    base = profile["settings"]["allocator"]
    if profile["settings"]["strength"] == 0:
        return f"strength is 0 in the recipe: this is {base} alone, uncorrected."
    search = profile["search"]
    if search is None:
        return ""
    kept = not any(entry["chosen"] for entry in search["rounds"])
    if search["start"] == "uniform":
        told = (
            f"Uniform beat {base} on the held-out samples "
            f"({search['uniform_loss']:.3f} against {search['base_loss']:.3f} nats), "
            "so the correction started from uniform"
        )
        more = " and no strength beat it: this is a uniform allocation" if kept else ""
        return f"{told}{more}."
    if kept:
        return (
            "Strength 0 was chosen: no correction beat the base allocation on the "
            "held-out samples by more than their standard error."
        )
    return ""


def _rehearsal(profile: Mapping[str, Any]) -> str:
    rehearsed = profile["confirmed"]
    if not rehearsed:
        return ""
    # "uniform" is the outcome where no round took a step from there
    outcome = "searched" if "searched" in rehearsed["losses"] else "uniform"
    if rehearsed["chosen"] == outcome:
        return ""
    losses = {n: v for n, v in rehearsed["losses"].items() if v is not None}
    told = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    chosen = {
        "base": f"that of {profile['settings']['allocator']} alone",
        "uniform": "uniform",
        "halfway": "halfway to what the search had found",
    }[rehearsed["chosen"]]
    return (
        "Rehearsed as SparseGPT prunes, what the masks had promised did not hold "
        f"(nats: {told}), so the allocation is {chosen}."
    )


def _noise(profile: Mapping[str, Any]) -> str:
    noise = profile["noise"]
    floor = noise and noise["floor"][-1]
    if not floor or noise["magnitude"] >= FLOOR_MARGIN * floor:
        return ""
    return (
        f"The noise, η = {noise['magnitude']:g}, is less than {FLOOR_MARGIN:g} times "
        f"the rounding floor of {floor:.1e}: the ratios r are partly arithmetic."
    )


def _cap(profile: Mapping[str, Any]) -> str:
    cap = profile["settings"]["max_sparsity"]
    full = [b["name"] for b in profile["blocks"] if b["sparsity"] > cap - 1e-6]
    if not full:
        return ""
    return f"At the cap, max_sparsity {cap:g}: {_listed(full)}."


def _unfinished(profile: Mapping[str, Any]) -> str:
    if profile["realised"] is not None:
        return ""
    return "Written before pruning was finished: the realised sparsity is not known."


def _unseen(profile: Mapping[str, Any]) -> str:
    unseen = profile.get("unseen_linears")
    if not unseen:
        return ""
    return (
        f"Saw no token when the statistics were taken: {_listed(unseen)}. Where the "
        "pruner has none for them either, it prunes an expert blindly and leaves a "
        "Linear that is not called dense; more calibration samples help experts."
    )


def _dense(profile: Mapping[str, Any]) -> str:
    known = set(profile.get("unseen_linears") or ())
    dense = [
        name
        for block in profile["blocks"]
        for short, linear in block["linears"].items()
        if linear["realised_sparsity"] == 0
        and linear["sparsity"] > 0
        and (name := f"{block['name']}.{short}") not in known
    ]
    if not dense:
        return ""
    return f"Left dense although a share was to go: {_listed(dense)}."


def _missed(profile: Mapping[str, Any]) -> str:
    realised, budget = profile["realised"], profile["budget"]
    if realised is None or abs(realised - budget) <= TOLERANCE:
        return ""
    return f"{realised:.4f} of the weights are zero, {budget:.4f} were asked for."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
