"""
What is judged is what is handed over, to the bit: at every level, for every pruner,
with Linears at the cap.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import runs, tiny
from helpers.probes import JUDGES, PRUNERS
from torch.nn import Linear
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.forward.probe import Probe
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.groups import LEVELS
from absorb_plugin.judges import pruned_loss
from absorb_plugin.pruners.adapter import PrunerAdapter
from absorb_plugin.pruners.masks import MaskedWeights
from absorb_plugin.pruners.observed import Observed, prune_observed
from absorb_plugin.signals import gradient

BUDGET, CAP = 0.7, 0.73
# Name -> sparsities in the order in which candidates ran.
Judged = dict[str, list[float]]


class Watch:
    """Notes at which sparsities judges make weights, and what is handed over."""

    def __init__(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names = {id(m): n for n, m in model.named_modules()}
        self.runs: list[tuple[type, Judged]] = []
        self.handed: dict[str, float] = {}
        self.upstream: dict[str, float] = {}
        self._judge: Judged | None = None
        self._run, self._weight = ProbeRunner.run, MaskedWeights.weight
        self._prune, self._set = prune_observed, PrunerAdapter.set_sparsities
        monkeypatch.setattr(ProbeRunner, "run", lambda *a, **k: self.run(*a, **k))
        monkeypatch.setattr(MaskedWeights, "weight", lambda *a: self.weight(*a))
        monkeypatch.setattr(pruned_loss, "prune_observed", self.prune)
        monkeypatch.setattr(
            PrunerAdapter, "set_sparsities", lambda *args: self.set_sparsities(*args)
        )

    def run(
        self, runner: Any, what: str, samples: list[dict], probe: Probe, **how: bool
    ) -> Any:
        self._judge = {} if type(probe) in JUDGES.values() else None
        result = self._run(runner, what, samples, probe, **how)
        if self._judge is not None:
            self.runs.append((type(probe), self._judge))
        self._judge = None
        return result

    def weight(
        self, masks: MaskedWeights, index: int, name: str, sparsity: float
    ) -> torch.Tensor:
        self._note(masks._blocks.blocks[index].linears[name], sparsity)
        return self._weight(masks, index, name, sparsity)

    def prune(
        self,
        pruner: Any,
        linears: Mapping[str, Linear],
        observed: list[Observed],
        sparsities: list[Mapping[str, list[float]]],
    ) -> Any:
        for name, (sparsity,) in chain(*(one.items() for one in sparsities)):
            self._note(linears[name], sparsity)
        return self._prune(pruner, linears, observed, sparsities)

    def set_sparsities(
        self, adapter: PrunerAdapter, sparsities: Mapping[str, float]
    ) -> None:
        self.handed = dict(sparsities)
        self._set(adapter, sparsities)
        modifier = adapter.modifier  # what llm-compressor goes by
        found = zip(modifier._target_layers, modifier.sparsity, strict=True)
        self.upstream = {name: s for name, s in found if name in sparsities}

    def _note(self, linear: Linear, sparsity: float) -> None:
        if self._judge is not None:
            self._judge.setdefault(self.names[id(linear)], []).append(sparsity)


def vectors(judged: Judged) -> Iterator[dict[str, float]]:
    """The candidates that a judge saw, one after the other."""
    for column in zip(*judged.values(), strict=True):
        yield dict(zip(judged, column, strict=True))


def prefer(self: Any) -> tuple[np.ndarray, np.ndarray]:
    """A judge's result: base is better than uniform, and the last is the best."""
    losses = np.full((len(self._candidates), len(self._tokens)), 100.0)
    losses[0 if len(losses) == 2 else -1] = 60.0 if len(losses) == 2 else 50.0
    return losses, np.full(len(self._tokens), 10.0)


def alike(
    model: PreTrainedModel, kind: str, one: dict[str, float], other: dict[str, float]
) -> bool:
    """The same, but that Wanda takes whole weights of a row: one more or less."""
    if kind != "wanda":
        return one == other
    columns = {name: model.get_submodule(name).in_features for name in one}
    return all(abs(one[x] - other[x]) <= 1.05 / columns[x] for x in one)


@pytest.mark.parametrize("kind", list(PRUNERS))
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("signal", ["gradient", "noise"])
def test_what_is_judged_is_what_is_handed_over(
    kind: str,
    level: str,
    signal: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.make_model("llama")
    watch = Watch(model, monkeypatch)
    for judge in JUDGES.values():
        monkeypatch.setattr(judge, "result", prefer)
    ours = runs.absorption(
        allocator="alpha_pruning",
        granularity="linear",
        level=level,
        signal=signal,
        strength="auto",
        rounds=9,
        max_sparsity=CAP,
    )
    runs.run(model, [ours, runs.pruner(kind, sparsity=BUDGET)], tmp_path)
    (last, judged), names = watch.runs[-1], list(find_blocks(model).linears())
    assert last is JUDGES["pruner"]
    *_, searched = vectors(judged)
    assert watch.handed == searched == watch.upstream
    # every judge saw whole allocations that could be handed over
    for _, judged in watch.runs:
        assert judged.keys() == set(names)
        for one in vectors(judged):
            assert max(one.values()) <= CAP
            sizes = [model.get_submodule(name).weight.numel() for name in one]
            mean = np.dot(sizes, list(one.values())) / sum(sizes)
            assert mean == pytest.approx(BUDGET, abs=1e-9)
    assert any(
        alike(model, kind, watch.handed, one)
        for judge, judged in watch.runs
        if judge is JUDGES["masks"]
        for one in vectors(judged)
    )
    # Wanda's, in whole weights of a row, where the next one would be beyond it
    columns = {name: model.get_submodule(name).in_features for name in names}
    whole = kind == "wanda" and level == "linear"
    at_cap = [
        name
        for name, sparsity in searched.items()
        if (CAP - sparsity) * columns[name] < (1 if whole else 1e-9)
    ]
    assert 0 < len(at_cap) < len(names)
    check_zeros(model, kind, searched)


def check_zeros(
    model: PreTrainedModel, kind: str, sparsities: Mapping[str, float]
) -> None:
    """The pruner makes of it what it says."""
    for name, sparsity in sparsities.items():
        weight = model.get_submodule(name).weight
        zeros, columns = (weight == 0).sum(dim=1), weight.shape[1]
        if kind == "wanda":
            assert set(zeros.tolist()) == {int(columns * sparsity)}, name
        else:
            count = int(weight.numel() * sparsity) + 1
            assert int(zeros.sum()) == pytest.approx(count, abs=3), name


@pytest.mark.parametrize("kind", list(PRUNERS))
def test_halfway_is_handed_over_as_it_was_judged(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make_model("llama")
    watch = Watch(model, monkeypatch)
    monkeypatch.setattr(JUDGES["masks"], "result", prefer)
    # by so few tokens half of the way would be less than a weight of every row
    monkeypatch.setattr(gradient, "ENOUGH", 1)

    def result(self: Any) -> tuple[np.ndarray, np.ndarray]:
        rows = {1: [10.0], 3: [50.0, 60.0, 90.0], 2: [50.0, 90.0]}
        column = np.array(rows[len(self._candidates)])
        count = len(self._tokens)
        return np.tile(column[:, None], count), np.full(count, 10.0)

    monkeypatch.setattr(JUDGES["pruner"], "result", result)
    ours = runs.absorption(level="linear", strength="auto", rounds=3, max_sparsity=CAP)
    runs.run(model, [ours, runs.pruner(kind, sparsity=BUDGET)], tmp_path)
    (_, judged) = watch.runs[-1]
    (halfway,) = vectors(judged)
    assert watch.handed == halfway == watch.upstream
    check_zeros(model, kind, halfway)
