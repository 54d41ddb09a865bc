"""The charts of `absorb compare`: one for each measure that any run has."""

from collections.abc import Mapping, Sequence
from typing import Any

from absorb_plugin.report.charts import BarChart, Chart

__all__ = ["compare_charts"]

Run = Mapping[str, Any]

# Beyond this ratio bars of perplexity only show the largest.
LOGARITHMIC = 20


def compare_charts(runs: Sequence[Run]) -> list[Chart]:
    """
    :param runs: what `absorb compare --json` prints under "runs"
    :raises ValueError: if there is nothing to draw
    """
    charts = [_sparsity(runs), _perplexity(runs), *_accuracies(runs)]
    found: list[Chart] = [
        chart for chart in charts if any(value is not None for value in chart.values)
    ]
    if not found:
        raise ValueError(
            "nothing to draw: no run has a realised sparsity, a perplexity or an "
            "accuracy. Evaluate one first, with `absorb eval`"
        )
    return found


def _names(runs: Sequence[Run]) -> list[str]:
    return [run["name"] for run in runs]


def _sparsity(runs: Sequence[Run]) -> BarChart:
    values = [run["sparsity"] for run in runs]
    return BarChart("realised sparsity", "sparsity", _names(runs), values)


def _perplexity(runs: Sequence[Run]) -> BarChart:
    values = [run["perplexity"] for run in runs]
    known = [value for value in values if value is not None]
    far = bool(known) and max(known) > LOGARITHMIC * min(known)
    return BarChart(
        "perplexity (lower is better)",
        "perplexity",
        _names(runs),
        values,
        points=far,
        log=far,
    )


def _accuracies(runs: Sequence[Run]) -> list[BarChart]:
    tasks = dict.fromkeys(name for run in runs for name in run["tasks"])
    return [_accuracy(task, runs) for task in tasks]


def _accuracy(task: str, runs: Sequence[Run]) -> BarChart:
    found = [run["tasks"].get(task) or {} for run in runs]
    return BarChart(
        task,
        "accuracy ± standard error",
        _names(runs),
        [result.get("acc") for result in found],
        [result.get("stderr") for result in found],
        points=True,
    )
