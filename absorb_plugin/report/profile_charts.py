"""The charts of a run, from its profile."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from absorb_plugin.report.charts import (
    BarChart,
    Cell,
    Chart,
    HeatMap,
    Line,
    LineChart,
    number,
    rule,
)
from absorb_plugin.report.words import allocation_name, judge_name

__all__ = ["drift_chart", "profile_charts"]

Profile = Mapping[str, Any]

# The rounding floor is left out where it lies so many times below all else.
FLOOR_IN_SIGHT = 100
# Linears of a block whose targets differ by less are pruned alike.
ALIKE = 1e-9


def profile_charts(profile: Profile) -> list[Chart]:
    """
    :param profile: content of profile.json
    :return: a chart for each thing that was measured
    """
    parts = (
        _sparsity,
        _linears,
        _quality,
        _search,
        _descent,
        _confirmed,
        _ratio,
        _drift,
    )
    return list(chain.from_iterable(part(profile) for part in parts))


def _column(profile: Profile, key: str) -> list[float | None]:
    return [block[key] for block in profile["blocks"]]


def _sparsity(profile: Profile) -> Iterator[Chart]:
    x = range(len(profile["blocks"]))
    base = profile["settings"]["allocator"]
    lines = [
        rule("budget", x, profile["budget"]),
        Line(base, "base", x, _column(profile, "base_sparsity")),
        Line("target", "final", x, _column(profile, "sparsity")),
    ]
    if profile["realised"] is not None:
        realised = _column(profile, "realised_sparsity")
        lines.append(Line("realised", "realised", x, realised))
    yield LineChart("Sparsity per block", "block", "sparsity", lines)


def _linears(profile: Profile) -> Iterator[Chart]:
    """Targets over Linears and depth, where the Linears of a block differ."""
    blocks = profile["blocks"]
    if not any(_spread(block["linears"]) > ALIKE for block in blocks):
        return
    grouped = [_by_kind(block["linears"]) for block in blocks]
    kinds = list(dict.fromkeys(kind for block in grouped for kind in block))
    yield HeatMap(
        "Sparsity per Linear",
        "block",
        kinds,
        [block["name"].rpartition(".")[2] for block in blocks],
        [
            [
                _cell(block["name"], kind, found[kind]) if kind in found else None
                for block, found in zip(blocks, grouped, strict=True)
            ]
            for kind in kinds
        ],
        profile["budget"],
        "budget",
        "Below the budget a Linear is protected, above it is pruned more.",
        least=0.0,
        most=1.0,
    )


def _spread(linears: Mapping[str, Any]) -> float:
    found = [linear["sparsity"] for linear in linears.values()]
    return max(found) - min(found)


def _by_kind(linears: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The experts of a block are one kind."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, linear in linears.items():
        kind = re.sub(r"\b(experts)\.\d+\b.*", r"\1", name)
        kinds.setdefault(kind, []).append(linear)
    return kinds


def _cell(block: str, kind: str, linears: Sequence[Mapping[str, Any]]) -> Cell:
    target = _mean(linears, "sparsity")
    assert target is not None  # every Linear has one
    note = f"{block}.{kind}: target {target:.4f}"
    if len(linears) > 1:
        found = [linear["sparsity"] for linear in linears]
        note += f" (mean of {len(linears)}, {min(found):.4f} … {max(found):.4f})"
    for key, word in (("base_sparsity", "base"), ("realised_sparsity", "realised")):
        if (value := _mean(linears, key)) is not None:
            note += f", {word} {value:.4f}"
    return Cell(target, note)


def _mean(linears: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """By weights; None if it is not known of all."""
    if any(linear[key] is None for linear in linears):
        return None
    total = sum(linear["parameters"] for linear in linears)
    return sum(linear[key] * linear["parameters"] for linear in linears) / total


def _quality(profile: Profile) -> Iterator[Chart]:
    quality = profile["quality"]
    if quality is None:
        return
    curve = sorted(quality["curve"], key=lambda point: point["sparsity"])
    x = [point["sparsity"] for point in curve]
    line = Line(
        "increase ± standard error",
        "final",
        x,
        [point["loss_increase"] for point in curve],
        [point["standard_error"] for point in curve],
        ring=x.index(quality["found"]) if quality["found"] in x else None,
    )
    bound = quality["max_loss_increase"]
    after = ", quantised after pruning" if quality.get("quantization") else ""
    yield LineChart(
        "Loss over sparsity",
        "sparsity",
        "loss increase [nats per token]",
        [rule("max_loss_increase", x, bound), line],
        f"Over the dense model{after}. Circled: the sparsity taken.",
    )


def _search(profile: Profile) -> Iterator[Chart]:
    search = profile["search"]
    if search is None or not search["rounds"]:
        return
    found = search["rounds"][-1]  # the only one, but of an older version
    strengths, losses = found["strengths"], found["losses"]
    ring = strengths.index(found["chosen"])
    yield LineChart(
        "Search for the strength",
        "strength β",
        "held-out loss [nats per token]",
        [
            *_starts(profile, strengths),
            Line("held out", "final", strengths, losses, ring=ring),
        ],
        _taken(profile),
    )


def _starts(profile: Profile, x: Sequence[float]) -> Iterator[Line]:
    """Held-out losses of the base allocation and of uniform."""
    for name, style in (("base", "base"), ("uniform", "rule")):
        loss = profile["search"][f"{name}_loss"]
        if loss is not None:
            yield rule(allocation_name(profile, name), x, loss, style)


def _descent(profile: Profile) -> Iterator[Chart]:
    search = profile["search"]
    if search is None or not search["steps"]:
        return
    made = [point["steps"] for point in search["judged"]]
    held_out = [point["loss"] for point in search["judged"]]
    own = [step["loss"] for step in search["steps"]]
    # before a pruner that repairs, the end of the path is taken and not judged here
    ring = made.index(search["taken"]) if search["taken"] in made else None
    yield LineChart(
        "Descent",
        "steps made",
        "loss [nats per token]",
        [
            *_starts(profile, range(len(own) + 1)),
            Line("samples of each step", "realised", range(len(own)), own),
            Line("held out", "final", made, held_out, ring=ring),
        ],
        f"{_taken(profile, ring is not None)} Every step goes by other samples than "
        "the one before, as far as there are any.",
    )


def _taken(profile: Profile, circled: bool = True) -> str:
    """
    What became of the outcome of the search.

    :param circled: that outcome; else it is the end of the path
    """
    confirmed = profile["confirmed"]
    losses = {} if confirmed is None else confirmed["losses"]
    # it may be base or uniform itself, and go by that name
    if confirmed is None or losses[confirmed["chosen"]] == losses.get("searched"):
        return "Circled: taken." if circled else "The end was taken."
    what = "What is circled" if circled else "The end"
    return f"{what} went into the last comparison, which took another."


def _confirmed(profile: Profile) -> Iterator[Chart]:
    confirmed = profile["confirmed"]
    if confirmed is None or len(confirmed["losses"]) < 2:
        return
    names = list(confirmed["losses"])
    yield BarChart(
        "Confirmed loss",
        "loss [nats per token]",
        [allocation_name(profile, name) for name in names],
        list(confirmed["losses"].values()),
        caption=f"Judged by {judge_name(confirmed['judge'])}. Circled: taken.",
        points=True,
        ring=names.index(confirmed["chosen"]),
    )


def _ratio(profile: Profile) -> Iterator[Chart]:
    if profile["noise"] is None:
        return
    x, errors = range(len(profile["blocks"])), _column(profile, "ratio_error")
    ratio = Line("", "final", x, _column(profile, "ratio"), errors)
    yield LineChart(
        "Absorption ratio",
        "block after which noise is put",
        "ratio r",
        [rule("", x, 1.0), ratio],
        "Below 1 the rest of the network absorbs the noise "
        f"(η = {profile['noise']['magnitude']:g}), above 1 it amplifies it.",
    )


def _drift(profile: Profile) -> Iterator[Chart]:
    noise = profile["noise"]
    if noise is None:
        return
    yield drift_chart(
        "Drift over depth",
        [block["drift"] for block in profile["blocks"]],
        noise["floor"],
        "One line per block of injection, stronger for later blocks. Rounding "
        f"alone makes {number(noise['floor'][-1])}.",
    )


def drift_chart(
    title: str,
    rows: Sequence[Sequence[float | None]],
    floor: Sequence[float],
    caption: str = "",
    y_limits: tuple[float, float] | None = None,
) -> LineChart:
    """
    :param rows: R_{l→k}, one row per injection block l, None where k < l
    :param floor: drift that rounding alone makes, one per block
    """
    last = len(rows) - 1
    names = {0: "after the first block", last: "after the last"}
    lines = [
        Line(
            names.get(row, ""),
            "depth",
            range(len(values)),
            values,
            dots=row == last,  # it has one point only
            opacity=0.25 + 0.75 * row / max(1, last),
        )
        for row, values in enumerate(rows)
    ]
    if y_limits is not None or _in_sight(floor, rows):
        drawn = Line("rounding floor", "base", range(len(floor)), floor, dots=False)
        lines.insert(0, drawn)
    return LineChart(
        title, "block k", "drift R", lines, caption, log_y=True, y_limits=y_limits
    )


def _in_sight(floor: Sequence[float], rows: Sequence[Sequence[float | None]]) -> bool:
    """Whether the rounding floor leaves room to tell the lines above it apart."""
    drifts = [value for row in rows for value in row if value]
    return bool(drifts) and floor[-1] >= min(drifts) / FLOOR_IN_SIGHT
