"""The cost model of docs/scaling.md, on a shape that is traced in seconds."""

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.benchmarks import imported
from transformers import LlamaConfig, LlamaForCausalLM

from absorb_plugin.blocks import find_blocks
from absorb_plugin.forward.run import run_probes
from absorb_plugin.judges import PrunedLoss
from absorb_plugin.pruners import PRUNERS, Pruner

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
    with imported("cost_model") as script:
        yield script


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_tables(
    cost_model: ModuleType, pruner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cost_model.CONFIGS, "tiny", TINY)
    for gpus in (1, 8):
        rows = cost_model.model_rows("tiny", pruner, gpus, samples=64, tokens=64)
        itself = cost_model.pruner_cost("tiny", pruner, gpus, 64, 64)
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


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_the_pruner_observes_what_it_does_in_a_run(
    cost_model: ModuleType, pruner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cost_model.CONFIGS, "tiny", TINY)
    kind = PRUNERS[pruner]()
    last = cost_model.schedule(kind, 256, 64, 64)[-1]
    assert 0 < last.pruning < last.samples
    observe, rows = type(kind).observe, []

    def noted(self: Pruner, inputs: torch.Tensor) -> torch.Tensor:
        rows.append((inputs.device.type, len(inputs)))
        return observe(self, inputs)

    monkeypatch.setattr(type(kind), "observe", noted)
    cost_model.traced("tiny", 2, last, kind, last.samples, 1)
    config = LlamaConfig(**TINY | {"num_hidden_layers": 2})
    model = LlamaForCausalLM(config).eval()
    blocks = find_blocks(model)
    candidates = [np.full(len(blocks.linears()), s) for s in (0.5, 0.6, 0.7)]
    probe = PrunedLoss(blocks, kind, candidates, last.pruning)
    ids = torch.randint(0, 512, (last.samples, last.tokens))
    run_probes(model, blocks, [{"input_ids": ids}], [probe])
    inputs = 2 * 3 * 4  # blocks, candidates, and inputs of a block's Linears
    calibrating = last.pruning * last.tokens
    assert [n for where, n in rows if where == "cpu"] == [calibrating] * inputs
    assert [n for where, n in rows if where == "meta"] == [calibrating] * inputs


def test_masks_that_shapes_give_are_known(cost_model: ModuleType) -> None:
    gpu_trace = import_module("gpu_trace")
    x = torch.ones(3, 4, 5, device="meta")
    with gpu_trace.tracing():
        mask = torch.ones_like(x[..., 0], dtype=torch.bool)
        mask[1:] = False
        assert mask[:2].any() and not mask[1:].any()
        assert x[mask].shape == (4, 5) and x[~mask.t().clone().t()].shape == (8, 5)
        mask[1] = x[1, :, 0] > 0  # not known: all is picked
        assert mask[1:].any() and x[mask].shape == (12, 5)


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
