"""Offloaded blocks that stay on the device while there is room for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.offload import set_onload_device
from helpers import tiny
from helpers.fake_accelerator import FakeDevice, fake_accelerator
from helpers.probes import PROBES, numbers, place
from torch.nn import Module
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.devices import is_offloaded
from absorb_plugin.evaluation.allocation import allocate_model
from absorb_plugin.forward.resident import RESERVE, Kept, kept_onloaded, release, room
from absorb_plugin.forward.run import run_probes
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.settings import AllocationSettings

MEMORY = 1000  # that a probe may take, for the room only


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with fake_accelerator() as found:
        yield found


@pytest.fixture
def offloaded(device: FakeDevice) -> PreTrainedModel:
    return set_onload_device(tiny.make_model("llama"), torch.device("fake:0"))


def set_room(
    model: PreTrainedModel,
    blocks: int,
    monkeypatch: pytest.MonkeyPatch,
    memory: int = MEMORY,
) -> None:
    """
    So much is free on the device that this number of blocks may stay beside a probe
    that takes `memory` bytes.
    """
    sizes = [bytes_of(block) for block in find_blocks(model).modules]
    outside = bytes_of(model) - sum(sizes)
    wanted = memory + 2 * max(sizes) + outside + sum(sizes[:blocks])
    free = int(wanted / (1 - RESERVE)) + 2
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *_: (free, 2**40))


def bytes_of(module: Module) -> int:
    with torch.no_grad():
        return sum(x.nbytes for x in [*module.parameters(), *module.buffers()])


@contextmanager
def counted(device: FakeDevice) -> Iterator[dict[str, int]]:
    device.log.clear()
    found: dict[str, int] = {}
    yield found
    found["bytes"] = device.log["bytes to device"]


def slopes(model: PreTrainedModel, where: Any) -> np.ndarray:
    probe = PROBES["slope under masks"].make(where)
    run_probes(model, where.blocks, [tiny.make_batch(3)], [probe])
    return numbers(probe)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_blocks_are_onloaded_once(
    blocks: int,
    device: FakeDevice,
    offloaded: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_room(offloaded, blocks, monkeypatch)
    where = place(offloaded, tiny.make_batch())
    modules = where.blocks.modules
    with counted(device) as before:
        expected = slopes(offloaded, where)
    with kept_onloaded(offloaded, modules, MEMORY):
        first = slopes(offloaded, where)
        with counted(device) as after:
            second = slopes(offloaded, where)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
    # a round visits every block twice
    saved = 2 * sum(bytes_of(block) for block in modules[:blocks])
    assert before["bytes"] - after["bytes"] == pytest.approx(saved, rel=0.02)


def test_the_model_is_as_before(
    offloaded: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(offloaded, 2, monkeypatch)
    caches = {x: (x._parameters, x._buffers) for x in offloaded.modules()}
    with (
        pytest.raises(KeyboardInterrupt),
        kept_onloaded(offloaded, find_blocks(offloaded).modules, MEMORY),
    ):
        kept = [x for x in offloaded.modules() if isinstance(x._parameters, Kept)]
        assert kept and all(map(is_offloaded, kept))
        raise KeyboardInterrupt
    assert all(
        x._parameters is parameters and x._buffers is buffers
        for x, (parameters, buffers) in caches.items()
    )


def test_a_weight_that_is_written_is_read_again(
    offloaded: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(offloaded, 3, monkeypatch)
    linear = offloaded.model.layers[0].mlp.down_proj
    with kept_onloaded(offloaded, find_blocks(offloaded).modules, MEMORY):
        assert linear.weight is linear.weight
        linear.weight = torch.nn.Parameter(torch.zeros_like(linear.weight))
        assert not linear.weight.any()
    assert not linear.weight.any()


def test_room_is_given_back_before_a_batch_is_halved(
    offloaded: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
) -> None:
    set_room(offloaded, 3, monkeypatch)
    where = place(offloaded, tiny.make_batch())
    modules = where.blocks.modules
    expected, seen = slopes(offloaded, where), []

    def full(module: Module, args: tuple[torch.Tensor]) -> None:
        seen.append(len(args[0]))
        if len(seen) == 1:
            raise torch.OutOfMemoryError("the device is full")

    hook = modules[-1].mlp.register_forward_pre_hook(full)
    with kept_onloaded(offloaded, modules, MEMORY):
        np.testing.assert_array_equal(slopes(offloaded, where), expected)
        assert not release(modules)
    hook.remove()
    assert set(seen) == {3}
    assert not any("does not fit" in message for message in warnings)


def test_what_passes_the_limit_takes_the_room(
    offloaded: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(offloaded, 3, monkeypatch)
    where = place(offloaded, tiny.make_batch())
    probe = PROBES["pruner of sparsegpt"].make(where)
    with kept_onloaded(offloaded, where.blocks.modules, MEMORY):
        slopes(offloaded, where)
        run_probes(offloaded, where.blocks, [tiny.make_batch(3)], [probe], memory=1)
        assert not release(where.blocks.modules)


def test_without_offload_nothing_is_kept(device: FakeDevice) -> None:
    for model in (tiny.make_model("llama"), tiny.make_model("llama").to("fake:0")):
        with kept_onloaded(model, find_blocks(model).modules, MEMORY):
            assert not any(isinstance(x._parameters, Kept) for x in model.modules())


@pytest.mark.parametrize(("free", "found"), [(1000, 900 - 100 - 20 - 5), (100, 0)])
def test_room(free: int, found: int) -> None:
    assert room(free, memory=100, block=10, outside=5) == found


@pytest.mark.parametrize(("given", "share"), [("auto", 2), (2**24, 1)])
def test_probes_make_do_with_less_beside_them(
    given: Any, share: int, offloaded: PreTrainedModel
) -> None:
    runner = ProbeRunner(offloaded, find_blocks(offloaded), given)
    before = runner._memory
    with runner.kept_onloaded():
        assert runner._memory == before // share
    assert runner._memory == before


def test_an_allocation_keeps_blocks_and_is_the_same(
    device: FakeDevice, offloaded: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"rounds": 3, "probe_memory": 2**24}
    moved, found = [], []
    for blocks in (0, 3):
        set_room(offloaded, blocks, monkeypatch, 2**24)
        with counted(device) as count:
            settings = AllocationSettings(**fields)
            allocation = allocate_model(offloaded, tiny.make_dataset(6), 0.5, settings)
        moved.append(count["bytes"])
        found.append(allocation.sparsity)
    np.testing.assert_array_equal(*found)
    assert moved[1] < 0.7 * moved[0]
