"""A third pruner and another signal: one class, and one line in a list."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import runs, tiny
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from pydantic import Field, PrivateAttr

from absorb_plugin.groups import LEVELS
from absorb_plugin.pruners import PRUNERS, MaskPruner
from absorb_plugin.search.descent import Slopes
from absorb_plugin.signals import SIGNALS, Context, Signal


class MagnitudeModifier(SparsityModifierBase):
    """A pruner as others write them for llm-compressor: the least |W| of a row go."""

    _seen: set = PrivateAttr(default_factory=set)

    def calibrate_module(
        self, module: torch.nn.Module, args: tuple, _output: torch.Tensor
    ) -> None:
        self._seen.add(module)

    @torch.no_grad()
    def compress_modules(self) -> None:
        for module in self._seen:
            weight, sparsity = module.weight, self._module_sparsities[module]
            ranks = weight.abs().argsort(dim=1).argsort(dim=1)
            weight[ranks < int(weight.shape[1] * sparsity)] = 0
        self._seen.clear()

    def on_finalize(self, state: object, **kwargs: object) -> bool:
        self.remove_hooks()
        return True


@dataclass(frozen=True)
class Magnitude(MaskPruner):
    name: ClassVar[str] = "magnitude"
    modifier: ClassVar[type[SparsityModifierBase]] = MagnitudeModifier

    def score(self, weight: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
        return weight.abs().float()


@pytest.mark.parametrize("signal", list(SIGNALS))
@pytest.mark.parametrize("strength", ["auto", 0.2])
def test_a_third_pruner(
    signal: str,
    strength: float | str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PRUNERS, "magnitude", Magnitude)
    model = tiny.make_model("llama")
    before = tiny.snapshot(model)
    ours = runs.absorption(signal=signal, strength=strength, report_dir=tmp_path)
    pruner = MagnitudeModifier(
        sparsity=0.5, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    runs.run(model, [ours, pruner], tmp_path)
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["achieved"] == pytest.approx(0.5, abs=1e-6)
    for block in profile["blocks"]:
        for name, linear in block["linears"].items():
            weight = before[f"{block['name']}.{name}.weight"]
            least = weight.abs().argsort(dim=1).argsort(dim=1)
            gone = least < int(weight.shape[1] * linear["sparsity"])
            found = model.get_submodule(f"{block['name']}.{name}").weight
            assert torch.equal(found, weight.masked_fill(gone, 0))


def test_an_unknown_pruner_is_refused(tmp_path: Path) -> None:
    pruner = MagnitudeModifier(sparsity=0.5, targets=["Linear"])
    with pytest.raises(ValueError, match="MagnitudeModifier: .* WandaPruningModifier"):
        runs.run(tiny.make_model("llama"), [runs.absorption(), pruner], tmp_path)


class LateIsCheap(Signal):
    """Says that late blocks stand more, each by so much."""

    name: ClassVar[str] = "late"

    slope: float = Field(default=1.0, gt=0)

    def measurer(self, context: Context) -> Callable[[np.ndarray], Slopes]:
        mean = -self.slope * context.groups.block_of.astype(float)
        return lambda allocation: Slopes(mean, np.full(len(mean), np.nan), 0.0)


@pytest.mark.parametrize("level", LEVELS)
def test_a_new_signal(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNALS, "late", LateIsCheap)
    found = runs.allocate(
        tiny.make_model("llama"),
        signal="late",
        signal_args={"slope": 2.0},
        strength=0.1,
        level=level,
        allocator="uniform",
    )
    assert found.signal == "late" and found.level == level
    by_block = found.block_means(found.sparsity)
    np.testing.assert_allclose(by_block, [0.4, 0.5, 0.6])
    with pytest.raises(ValueError, match=r"signal 'late': nope=1.*slope=1\.0"):
        runs.allocate(tiny.make_model("llama"), signal="late", signal_args={"nope": 1})


@pytest.mark.parametrize("signal", list(SIGNALS))
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", list(PRUNERS))
def test_every_signal_at_every_level_for_every_pruner(
    signal: str, level: str, kind: str
) -> None:
    model = tiny.make_model("qwen3_moe", num_hidden_layers=2)
    before = tiny.snapshot(model)
    for strength in (0.2, "auto"):
        found = runs.allocate(
            model, kind=kind, signal=signal, level=level, strength=strength, rounds=2
        )
        assert found.achieved() == pytest.approx(0.5, abs=1e-6)
        assert found.direction.shape == found.sparsity.shape and found.direction.any()
    tiny.assert_untouched(model, before)
