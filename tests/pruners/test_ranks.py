"""What is reduced before pruning, and what is left alone."""

from collections.abc import Iterator

import pytest
import torch
from helpers import runs, tiny
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from torch import distributed

from absorb_plugin.pruners import pruner_class
from absorb_plugin.pruners.ranks import reduce_statistics
from absorb_plugin.pruners.wrapped import unwrap, wrap

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


def attribute_of(modifier: SparsityModifierBase) -> str:
    attribute = pruner_class(modifier).rank_statistics
    assert attribute is not None
    return attribute


def calibrated(kind: str) -> tuple[SparsityModifierBase, torch.nn.Module]:
    """A pruner that has seen two samples of one Linear."""
    modifier, linear = runs.pruner(kind), torch.nn.Linear(16, 8)
    modifier._module_names = {linear: "up_proj"}
    modifier._module_sparsities = {linear: 0.5}
    modifier.calibrate_module(linear, (torch.randn(2, 5, 16),), torch.empty(0))
    return modifier, linear


def test_a_pruner_without_the_names_is_left_alone(
    group: None, warnings: list[str]
) -> None:
    modifier = Fake(sparsity=0.5)
    reduce_statistics(modifier, "_hessians")
    assert "compress_modules" not in modifier.__dict__
    (message,) = warnings
    assert "Fake does not keep its statistics" in message
    assert "_hessians is no dict" in message
    modifier.compress_modules()
    assert modifier._compressed == 1


@pytest.mark.parametrize("kind", list(runs.PRUNERS))
@pytest.mark.parametrize("change", ["count", "statistic", "name"])
def test_what_the_names_hold_is_checked_too(
    group: None,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    change: str,
) -> None:
    modifier, linear = calibrated(kind)
    called: list[object] = []
    monkeypatch.setattr(
        type(modifier), "compress_modules", lambda self: called.append(self)
    )
    reduce_statistics(modifier, attribute_of(modifier))
    assert "compress_modules" in modifier.__dict__ and not warnings
    noted: list[None] = []  # as zeros are
    wrap(modifier, "compress_modules", lambda prune: noted.append(prune()))
    if change == "count":  # as GPTQ keeps it, which reduces by itself
        modifier._num_samples[linear] = torch.tensor(2)
    elif change == "statistic":
        getattr(modifier, attribute_of(modifier)).clear()
    else:
        modifier._module_names = {}
    modifier.compress_modules()
    modifier.compress_modules()
    assert called == [modifier, modifier] and len(noted) == 2
    (message,) = warnings
    assert "does not keep its statistics as absorb_plugin knows it" in message


@pytest.mark.parametrize("kind", list(runs.PRUNERS))
def test_one_rank_prunes_as_without(group: None, kind: str) -> None:
    weights = []
    for reduced in (False, True):
        torch.manual_seed(0)
        modifier, linear = calibrated(kind)
        if reduced:
            reduce_statistics(modifier, attribute_of(modifier))
        modifier.compress_modules()
        unwrap(modifier, "compress_modules")
        assert "compress_modules" not in modifier.__dict__
        weights.append(tiny.snapshot(linear))
    tiny.assert_same(*weights)
    assert 0.3 < (weights[0]["weight"] == 0).float().mean() < 0.7


def test_nothing_is_wrapped_without_a_process_group() -> None:
    modifier = runs.pruner()
    reduce_statistics(modifier, attribute_of(modifier))
    assert "compress_modules" not in modifier.__dict__
