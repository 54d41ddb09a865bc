"""Every registered allocator, corrected, before every pruner, through `oneshot`."""

from pathlib import Path
from typing import Any

import pytest
from helpers import runs, tiny

from absorb_plugin.allocators import Allocator
from absorb_plugin.blocks import find_blocks
from absorb_plugin.hookspecs import hookimpl
from absorb_plugin.plugins import allocators, manager

BUDGET, STRENGTH = 0.5, 0.05


class Observer:
    """What the hook of outsiders is told."""

    def __init__(self) -> None:
        self.profiles: list[dict[str, Any]] = []

    @hookimpl
    def allocation_finished(self, profile: dict[str, Any]) -> None:
        self.profiles.append(profile)


def granularities() -> list[tuple[str, str]]:
    known: dict[str, type[Allocator]] = {
        name: entry.allocator for name, entry in allocators().items()
    }
    return [(name, g) for name, one in known.items() for g in one.granularities]


@pytest.mark.parametrize("kind", list(runs.PRUNERS))
@pytest.mark.parametrize(("name", "granularity"), granularities())
def test_allocator_correction_and_pruner(
    name: str, granularity: str, kind: str, tmp_path: Path
) -> None:
    model = tiny.make_model("llama", num_hidden_layers=2)
    before = tiny.snapshot(model)
    ours = runs.absorption(
        allocator=name, granularity=granularity, signal="noise", strength=STRENGTH
    )
    observer = Observer()
    manager().register(observer)
    try:
        runs.run(model, [ours, runs.pruner(kind)], tmp_path, samples=2)
    finally:
        manager().unregister(observer)

    (profile,) = observer.profiles
    assert profile["settings"]["allocator"] == name
    assert profile["achieved"] == pytest.approx(BUDGET, abs=1e-6)
    blocks = profile["blocks"]
    moved = [block["sparsity"] - block["base_sparsity"] for block in blocks]
    # blocks of one size: what one gains the other gives
    assert moved == pytest.approx([-moved[1], -moved[0]], abs=1e-9)
    assert 0 < abs(moved[0]) <= STRENGTH + 1e-9

    linears = find_blocks(model).linears()
    zeros = sum(int((linear.weight == 0).sum()) for linear in linears.values())
    total = sum(linear.weight.numel() for linear in linears.values())
    # rounded down in every row of 32 or 48 columns
    assert zeros / total == pytest.approx(BUDGET, abs=1 / 32)
    dense = [x for x in before if x.removesuffix(".weight") not in linears]
    after = tiny.snapshot(model)
    tiny.assert_same({x: before[x] for x in dense}, {x: after[x] for x in dense})
