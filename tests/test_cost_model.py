"""The cost model of docs/scaling.md, on a shape that is traced in seconds."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from absorb_plugin.pruners import PRUNERS

BENCHMARKS = Path(__file__).parents[1] / "integration" / "benchmarks"
TINY = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
)


@pytest.fixture(scope="module")
def cost_model() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module("cost_model")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_tables(
    cost_model: ModuleType, pruner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cost_model.CONFIGS, "tiny", TINY)
    for gpus in (1, 8):
        rows = cost_model.model_rows("tiny", pruner, gpus, samples=64, tokens=64)
        itself = cost_model.pruner_cost("tiny", pruner, 64, 64)
        printed = cost_model.tables([{"rows": rows, "itself": itself, "gpus": gpus}])
        assert f"tiny, {pruner}, {gpus} GPU" in printed and "Allocation" in printed
        stations = {row["station"] for row in rows}
        assert {"Input statistics", "OWL", "Loss slope", "Held-out loss"} <= stations
        assert any(name.startswith("Pruning as") for name in stations)
        # what is alive stays below what the package says
        assert all(row["peak"] <= row["statement"] for row in rows if row["statement"])


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_base_uniform_and_searched_are_compared_at_last(
    cost_model: ModuleType, pruner: str
) -> None:
    stations = cost_model.schedule(PRUNERS[pruner](), 256, 64, 64)
    last = stations[-1]
    assert (last.probe, last.candidates, last.runs) == ("PrunedLoss", 3, 1)


def test_an_op_takes_the_longest_of_its_parts(cost_model: ModuleType) -> None:
    gpu_trace = import_module("gpu_trace")
    rates = gpu_trace.RATES
    one = torch.ones(4096, 4096, device="meta", dtype=torch.bfloat16)
    with gpu_trace.tracing({"one": one}) as cost:
        one @ one
        one + 1
        one.float().sort(dim=1)
        one[:2, :2] + 1
    assert cost.count["FLOP"] == 2 * 4096**3
    assert cost.seconds["products"] == pytest.approx(2 * 4096**3 / rates.half)
    moved = (2 + 2 + 2 + 4) * 4096**2
    assert cost.seconds["traffic"] == pytest.approx(moved / rates.traffic)
    assert cost.count["sorted"] == 4096**2
    assert cost.seconds["sorts"] == pytest.approx(4096**2 / rates.sort)
    assert cost.seconds["launches"] == pytest.approx(rates.launch)
    # the float copy, its sorted values, and their indices
    assert cost.peak == (4 + 4 + 8) * 4096**2
