"""`make gpu-check` where there is no GPU: on a fake one, at its smallest size."""

import json
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fake_accelerator import fake_accelerator

from absorb_plugin.forward.probe import Probe
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
    gpu_check: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    result = tmp_path / "result.json"
    with fake_accelerator() as device:
        code = gpu_check.main(
            ["--device", "fake:0", "--size", "tiny", "--json", str(result)]
        )
    printed = capsys.readouterr().out
    assert code == 0 and "all as it should be" in printed
    assert "fake Fake 1" in printed and device.log["to device"] > 100
    found = json.loads(result.read_text())
    probes = {row["probe"] for row in found["against the CPU"]}
    assert probes == {*gpu_check.CHECKS, gpu_check.HESSIAN}
    assert all(row["ok"] for row in found["against the CPU"])
    (walk,) = found["columns of SparseGPT"]
    assert min(walk["by patterns, ms"], walk["one by one, ms"]) > 0
    kinds = [row["memory"] for row in found["from the host"]]
    assert kinds == ["pageable", "page-locked"]


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


def more_nans(drift: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(drift), dtype=bool), np.nan, drift)


def one_linear_twice(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in sums if name.endswith("down_proj"))
    return sums | {name: 2 * sums[name]}


WRONG = {
    "one Linear's inputs": ("statistics", one_linear_twice),
    "NaN": ("noise", lambda one: replace(one, drift=more_nans(one.drift))),
    "no floor": ("noise", lambda one: replace(one, floor=0 * one.floor)),
    "response": ("response", lambda one: replace(one, response=200 * one.response)),
    "slopes": ("slope", lambda one: replace(one, slopes=1.01 * one.slopes)),
    "order": ("masked loss", lambda one: (one[0][::-1], one[1])),
    "order by wanda": ("loss by wanda", lambda one: (one[0][::-1], one[1])),
    "order by sparsegpt": ("loss by sparsegpt", lambda one: (one[0][::-1], one[1])),
    "sparsegpt's slopes": (
        "slope of sparsegpt",
        lambda one: replace(one, slopes=0 * one.slopes),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_on_the_device_only_fails(
    gpu_check: ModuleType,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    name, wrong = WRONG[case]
    check, made = gpu_check.CHECKS[name], []

    def make(*args: Any) -> Probe:
        made.append(check.make(*args))
        if len(made) == 2:  # the first is the CPU's
            result = made[-1].result
            made[-1].result = lambda: wrong(result())
        return made[-1]

    monkeypatch.setattr(gpu_check, "CHECKS", {name: replace(check, make=make)})
    for other in ("versions", "primitives", "stations", "pruned"):
        monkeypatch.setattr(gpu_check, other, lambda *_: [])
    assert gpu_check.main(["--device", "cpu"]) == 1
    assert f"against the CPU: {name}" in capsys.readouterr().out


def test_a_hessian_of_rounded_sums_fails(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_check.hessian(torch.device("cpu"))["ok"]
    monkeypatch.setattr(gpu_check, "gram", lambda x: (x.t() @ x).float())
    assert not gpu_check.hessian(torch.device("cpu"))["ok"]


def test_every_linear_has_a_slope_of_sparsegpt(gpu_check: ModuleType) -> None:
    model = gpu_check.build("tiny", torch.float32)
    blocks = gpu_check.find_blocks(model)
    probe = gpu_check.CHECKS["slope of sparsegpt"].make(blocks, {})
    gpu_check.run_probes(model, blocks, [gpu_check.batch(model, 4, 48)], [probe])
    assert probe.result().slopes.all()


def test_numbers_are_compared_with_their_own_kind(gpu_check: ModuleType) -> None:
    here = {"small": np.array([1e-3, np.nan]), "large": np.array([[100.0]])}
    same = gpu_check.compared(here, here, 1e-4)
    assert same["ok"] and same["off"] == 0.0
    off = gpu_check.compared(here, here | {"small": here["small"] * 1.5}, 1e-4)
    assert not off["ok"] and off["part"] == "small"
    assert off["off"] == pytest.approx(0.5)
    for there in (
        here | {"small": np.array([1e-3, 1e-3])},
        here | {"large": np.array([[np.inf]])},
        here | {"large": np.array([100.0, 100.0])},
        {"small": here["small"]},
    ):
        assert not gpu_check.compared(here, there, 1e-4)["ok"]
    nothing = {"slopes": np.zeros(4)}
    assert not gpu_check.compared(nothing, nothing, 1e-4)["ok"]


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
