"""`make gpu-check` where there is no GPU: on a fake one, at its smallest size."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.fake_accelerator import fake_accelerator

from absorb_plugin.pruners import Pruner
from absorb_plugin.pruners.sparsegpt import SparseGPT
from absorb_plugin.pruners.wanda import Wanda

SCRIPT = Path(__file__).parents[1] / "integration" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["gpu_check"] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def test_on_a_fake_accelerator(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    result = tmp_path / "result.json"
    with fake_accelerator() as device:
        code = gpu_check.main(
            ["--device", "fake:0", "--size", "tiny", "--json", str(result)]
        )
    printed = capsys.readouterr().out
    assert code == 0 and "all as it should be" in printed
    assert "fake Fake 1" in printed and device.log["to device"] > 100
    found = json.loads(result.read_text())
    assert {row["probe"] for row in found["against the CPU"]} == set(gpu_check.CHECKS)
    assert all(row["ok"] for row in found["against the CPU"])


@pytest.mark.parametrize("name", ["loss by wanda", "model by sparsegpt"])
def test_the_trace_observes_what_a_run_does(
    gpu_check: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = SparseGPT if "sparsegpt" in name else Wanda
    observe, rows = kind.observe, []

    def noted(self: Pruner, inputs: torch.Tensor) -> torch.Tensor:
        rows.append((inputs.device.type, len(inputs)))
        return observe(self, inputs)

    monkeypatch.setattr(kind, "observe", noted)
    check, tokens = gpu_check.CHECKS[name], 16
    gpu_check._traced("tiny", check, tokens, 2)
    model = gpu_check.build("tiny", torch.float32)
    blocks = gpu_check.find_blocks(model)
    probe = check.make(blocks, gpu_check.square_sums(blocks, torch.device("cpu")))
    data = gpu_check.batch(model, check.samples, tokens)
    gpu_check.run_probes(model, blocks, [data], [probe])
    traced = [n for where, n in rows if where == "meta"]
    assert traced and traced == [n for where, n in rows if where == "cpu"]


def test_what_is_wrong_is_said(
    gpu_check: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    rows = {"a table": [{"probe": "slope", "off": 0.5, "ok": False}]}
    monkeypatch.setattr(gpu_check, "run_checks", lambda *_: rows)
    assert gpu_check.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "| slope | 0.5 | NO |" in printed and "a table: slope" in printed
