"""The figure of a run: drift over depth, ratio per block, base and final sparsity."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw"]

BASE, FINAL, UNIFORM = "#8a8f98", "#1f5fbf", "#c9ccd1"


def draw(profile: dict[str, Any]) -> bytes:
    """
    :param profile: from `Report.profile`
    :return: a PNG
    """
    measured = profile["noise"] is not None
    searched = profile["search"] is not None and profile["search"]["rounds"]
    panels = 1 + 2 * measured + bool(searched)
    figure = Figure(figsize=(9, 2.9 * panels), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(panels, 1)))
    _sparsity(axes.pop(0), profile)
    if measured:
        _ratio(axes.pop(0), profile)
        _drift(axes.pop(0), profile)
    if searched:
        _search(axes.pop(0), profile)
    model = profile["model"]["name_or_path"] or profile["model"]["class"]
    figure.suptitle(
        f"{model.rstrip('/').split('/')[-1]}: {profile['settings']['allocator']} + "
        f"absorption ({profile['settings']['signal']}), {profile['pruner']} at "
        f"{profile['budget']:.0%}"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _column(profile: dict[str, Any], key: str) -> np.ndarray:
    return _floats([block[key] for block in profile["blocks"]])


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def _sparsity(ax: Axes, profile: dict[str, Any]) -> None:
    blocks = np.arange(len(profile["blocks"]))
    ax.axhline(profile["budget"], color=UNIFORM, linewidth=1, label="budget")
    base, final = _column(profile, "base_sparsity"), _column(profile, "sparsity")
    ax.plot(blocks, base, "o-", color=BASE, markersize=4, label="base allocation")
    ax.plot(blocks, final, "o-", color=FINAL, markersize=4, label="corrected")
    ax.set(xlabel="block", ylabel="sparsity", title="Sparsity per block")
    ax.legend(frameon=False, ncols=3)
    _tidy(ax)


def _ratio(ax: Axes, profile: dict[str, Any]) -> None:
    ratio, error = _column(profile, "ratio"), _column(profile, "ratio_error")
    blocks = np.arange(len(ratio))
    ax.axhline(1.0, color=UNIFORM, linewidth=1)
    ax.errorbar(
        blocks, ratio, np.nan_to_num(error), fmt="o-", color=FINAL, markersize=4
    )
    eta = profile["noise"]["magnitude"]
    ax.set(
        xlabel="block behind which noise is put",
        ylabel="ratio $r$",
        title=f"Above 1 the rest of the network amplifies, below absorbs (η = {eta})",
    )
    _tidy(ax)


def _drift(ax: Axes, profile: dict[str, Any]) -> None:
    rows = [block["drift"] for block in profile["blocks"]]
    shades = 0.25 + 0.75 * np.arange(len(rows)) / max(1, len(rows) - 1)
    for row, shade in zip(rows, shades, strict=True):
        ax.plot(_floats(row), color=FINAL, alpha=float(shade), linewidth=1)
    floor = _floats(profile["noise"]["floor"])
    ax.plot(floor, "--", color=BASE, linewidth=1, label="rounding floor")
    ax.legend(frameon=False)
    ax.set(
        yscale="log",
        xlabel="block $k$",
        ylabel="drift $R_{l→k}$",
        title="Drift over depth, one line per block of injection (later: darker)",
    )
    _tidy(ax)


def _search(ax: Axes, profile: dict[str, Any]) -> None:
    search = profile["search"]
    for number, entry in enumerate(search["rounds"]):
        (line,) = ax.plot(
            entry["strengths"],
            _floats(entry["losses"]),
            "o-",
            markersize=4,
            label=f"round {number + 1}",
        )
        at = entry["strengths"].index(entry["chosen"])
        ax.plot(
            entry["chosen"],
            entry["losses"][at],
            "o",
            markersize=10,
            markerfacecolor="none",
            color=line.get_color(),
        )
    for name, style in (("base", "-"), ("uniform", ":")):
        if search[f"{name}_loss"] is not None:
            ax.axhline(
                search[f"{name}_loss"],
                color=BASE,
                linewidth=1,
                linestyle=style,
                label=name,
            )
    ax.set(
        xlabel="strength β",
        ylabel="held-out loss [nats]",
        title="Search for the strength (circled: taken)",
    )
    ax.legend(frameon=False, ncols=5)
    _tidy(ax)


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.02)
