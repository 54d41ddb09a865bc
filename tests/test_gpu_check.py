"""`make gpu-check` where there is no GPU: on a fake one, at its smallest size."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from helpers.fake_accelerator import fake_accelerator

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
