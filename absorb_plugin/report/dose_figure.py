"""The figures of `absorb profile`: drift over depth for every η, ratio over η."""

import io

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from absorb_plugin.signals.noise import FLOOR_MARGIN
from absorb_plugin.signals.noise_scan import NoiseScan

__all__ = ["draw_doses"]

COLUMNS = 3
FLOOR = "#8a8f98"


def draw_doses(found: NoiseScan, title: str) -> bytes:
    """
    :param title: of the whole figure, for example the model's name
    :return: a PNG
    """
    panels = len(found.magnitudes) + 2
    rows = -(-panels // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 3.1 * rows), layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS).flatten())
    colours = colormaps["viridis"](np.linspace(0, 0.92, max(2, len(found.names))))
    drifts = [profile.drift for profile in found.profiles]
    largest = np.nanmax([*map(np.nanmax, drifts), 1e-12])
    smallest = min(np.nanmin(found.floor), *found.magnitudes)
    for eta, drift in zip(found.magnitudes, drifts, strict=True):
        _drift(axes.pop(0), eta, drift, found.floor, colours)
    for ax in figure.axes[: len(found.magnitudes)]:
        ax.set_ylim(max(smallest, 1e-9) / 2, 2 * largest)
    _ratio(axes.pop(0), found, colours)
    _realignment(axes.pop(0), found)
    for ax in axes:
        ax.remove()
    scale = ScalarMappable(Normalize(0, len(found.names) - 1), colormaps["viridis"])
    figure.colorbar(scale, ax=figure.axes, label="block of injection", shrink=0.6)
    figure.suptitle(f"{title}, computed in {found.dtype}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _drift(
    ax: Axes, eta: float, drift: np.ndarray, floor: np.ndarray, colours: np.ndarray
) -> None:
    for row, colour in zip(drift, colours):
        ax.plot(row, color=colour, linewidth=1)
    ax.plot(floor, "--", color=FLOOR, linewidth=1.5, label="rounding floor")
    ax.axhline(eta, color=FLOOR, linewidth=0.7, linestyle=":")
    ax.set(yscale="log", xlabel="block $k$", title=f"drift $R_{{l→k}}$ at η = {eta:g}")
    ax.legend(frameon=False, loc="lower right", fontsize="small")
    _tidy(ax)


def _ratio(ax: Axes, found: NoiseScan, colours: np.ndarray) -> None:
    ratios = np.array([profile.ratio for profile in found.profiles])
    for column, colour in zip(ratios.T, colours):
        ax.plot(found.magnitudes, column, "o-", color=colour, linewidth=1, markersize=3)
    ax.axhline(1.0, color=FLOOR, linewidth=1)
    left, drowned = found.magnitudes[0] / 2, FLOOR_MARGIN * found.floor[-1]
    if drowned > left:
        label = f"below {FLOOR_MARGIN:g} times the floor"
        ax.axvspan(left, drowned, color=FLOOR, alpha=0.2, linewidth=0, label=label)
        ax.legend(frameon=False, fontsize="small")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="η",
        title="ratio $r$: above 1 amplified, below absorbed",
        xlim=(left, 2 * found.magnitudes[-1]),
    )
    _tidy(ax)


def _realignment(ax: Axes, found: NoiseScan) -> None:
    """Mean over injections of the cosine at the end, beside that at the injection."""
    at_injection, at_end = [], []
    for profile in found.profiles:
        rows = profile.realignment
        first = [row[np.isfinite(row)][0] for row in rows]
        at_injection.append(float(np.mean(first)))
        at_end.append(float(np.mean(rows[:, -1])))
    ax.plot(found.magnitudes, at_injection, "o--", color=FLOOR, label="at injection")
    ax.plot(found.magnitudes, at_end, "o-", color="#1f5fbf", label="behind last block")
    ax.set(xscale="log", xlabel="η", title="realignment: mean cosine to the clean run")
    ax.legend(frameon=False, fontsize="small")
    _tidy(ax)


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
