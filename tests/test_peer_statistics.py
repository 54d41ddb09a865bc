"""What is reduced before pruning, and what is left alone; whole runs: ranks.py."""

from collections.abc import Iterator

import pytest
import torch
from absorb_plugin.peer_statistics import leave_statistics, reduce_statistics
from helpers import runs, tiny
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from torch import distributed

pytestmark = pytest.mark.contract


class Fake(SparsityModifierBase):
    """A pruner that keeps its statistics elsewhere."""

    _compressed: int = 0

    def calibrate_module(self, *_: object) -> None: ...

    def compress_modules(self) -> None:
        self._compressed += 1


@pytest.fixture
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank."""
    store = f"file://{tmp_path_factory.mktemp('store')}/store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group("gloo", store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def calibrated(kind: str) -> tuple[SparsityModifierBase, torch.nn.Module]:
    """A pruner that has seen two samples of one Linear."""
    peer, linear = runs.pruner(kind), torch.nn.Linear(16, 8)
    peer._module_names = {linear: "up_proj"}
    peer._module_sparsities = {linear: 0.5}
    peer.calibrate_module(linear, (torch.randn(2, 5, 16),), torch.empty(0))
    return peer, linear


def test_a_pruner_without_the_names_is_left_alone(
    group: None, warnings: list[str]
) -> None:
    peer = Fake(sparsity=0.5)
    reduce_statistics(peer)
    assert "compress_modules" not in peer.__dict__
    (message,) = warnings
    assert "Fake does not keep its statistics" in message
    assert "neither of _row_scalars and _hessians" in message
    peer.compress_modules()
    assert peer._compressed == 1


@pytest.mark.parametrize("kind", list(runs.PRUNERS))
@pytest.mark.parametrize("change", ["count", "statistic", "name"])
def test_what_the_names_hold_is_checked_too(
    group: None,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    change: str,
) -> None:
    peer, linear = calibrated(kind)
    called: list[object] = []
    monkeypatch.setattr(
        type(peer), "compress_modules", lambda self: called.append(self)
    )
    reduce_statistics(peer)
    assert "compress_modules" in peer.__dict__ and not warnings
    if change == "count":  # as GPTQ keeps it, which reduces by itself
        peer._num_samples[linear] = torch.tensor(2)
    elif change == "statistic":
        (peer._row_scalars if kind == "wanda" else peer._hessians).clear()
    else:
        peer._module_names = {}
    peer.compress_modules()
    peer.compress_modules()
    assert called == [peer, peer]
    (message,) = warnings
    assert "does not keep its statistics as absorb_plugin knows it" in message


@pytest.mark.parametrize("kind", list(runs.PRUNERS))
def test_one_rank_prunes_as_without(group: None, kind: str) -> None:
    weights = []
    for reduced in (False, True):
        torch.manual_seed(0)
        peer, linear = calibrated(kind)
        if reduced:
            reduce_statistics(peer)
        peer.compress_modules()
        leave_statistics(peer)
        assert "compress_modules" not in peer.__dict__
        weights.append(tiny.snapshot(linear))
    tiny.assert_same(*weights)
    assert 0.3 < (weights[0]["weight"] == 0).float().mean() < 0.7


def test_nothing_is_wrapped_without_a_process_group() -> None:
    peer = runs.pruner()
    reduce_statistics(peer)
    assert "compress_modules" not in peer.__dict__
