"""The charts of `absorb curve`."""

from collections.abc import Mapping
from typing import Any

from absorb_plugin.report.charts import Chart, Line, LineChart

__all__ = ["curve_charts"]

STYLES = {"uniform": "rule", "base": "base", "ours": "final"}


def curve_charts(curve: Mapping[str, Any]) -> list[Chart]:
    """:param curve: what `absorb curve --json` prints"""
    points = curve["points"]
    sparsities = [point["sparsity"] for point in points]
    quantization = curve.get("quantization")
    pruner = curve["pruner"]
    if quantization is not None:
        pruner += f", then {quantization['quantize']}"
    names = {"uniform": "uniform", "base": curve["allocator"], "ours": "corrected"}

    def line(key: str, name: str) -> Line:
        values = [point[key][name] for point in points]
        return Line(names[name], STYLES[name], sparsities, values)

    return [
        LineChart(
            f"Perplexity over sparsity, {pruner}",
            "sparsity",
            "perplexity",
            [line("perplexity", name) for name in STYLES],
            f"On {curve['tokens']:,} held-out tokens; {curve['knee']}.",
            log_y=True,
        ),
        LineChart(
            "Growth of the loss over the dense model",
            "sparsity",
            "nats per token",
            [line("loss_increase", name) for name in STYLES],
        ),
    ]
