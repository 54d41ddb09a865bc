"""Offloaded blocks that stay on the device while there is room for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from compressed_tensors.offload import set_onload_device
from compressed_tensors.offload.convert import from_accelerate
from helpers import tiny
from helpers.benchmarks import imported
from helpers.fake_accelerator import FakeDevice, fake_accelerator, on_host
from helpers.probes import PROBES, numbers, place
from torch.nn import Module
from transformers import PreTrainedModel

from absorb_plugin import devices
from absorb_plugin.blocks import find_blocks
from absorb_plugin.devices import is_offloaded
from absorb_plugin.evaluation.allocation import allocate_model
from absorb_plugin.forward import joined
from absorb_plugin.forward.inputs import InputStatistics
from absorb_plugin.forward.resident import (
    RESERVE,
    Kept,
    kept_onloaded,
    own_rows,
    release,
    room,
    spare,
)
from absorb_plugin.forward.run import run_probes
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.pruners import SparseGPT, sparsegpt
from absorb_plugin.pruners.packed import Packed
from absorb_plugin.pruners.slopes import PrunedSlopes
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.signals.gradient import GradientProbe
from absorb_plugin.signals.pruned_model import PrunedModel

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
    # a round visits every block twice, and so it does what is outside
    kept = [*modules[:blocks], *outside(offloaded)] if blocks else []
    saved = 2 * sum(map(bytes_of, kept))
    # and the frequencies of the rotary embedding
    assert saved <= before["bytes"] - after["bytes"] <= saved + 64


def offload_blocks(model: PreTrainedModel, first: int) -> PreTrainedModel:
    """On the device but for the blocks from `first` on, as `absorb allocate` loads."""
    parts = [name for name, _ in model.model.named_children() if name != "layers"]
    places = {f"model.{name}": "fake:0" for name in parts} | {"lm_head": "fake:0"}
    for index in range(len(model.model.layers)):
        places[f"model.layers.{index}"] = "fake:0" if index < first else "cpu"
    dispatch_model(model, places, main_device="fake:0", force_hooks=True)
    from_accelerate(model)
    return model


def test_of_a_model_that_lies_partly_there_the_others_are_kept(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offload_blocks(tiny.make_model("llama", num_hidden_layers=5), 2)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *_: (2**30, 2**40))
    where = place(model, tiny.make_batch())
    modules = where.blocks.modules
    expected = slopes(model, where)
    with kept_onloaded(model, modules, MEMORY) as kept:
        assert kept == 3
        with counted(device) as first:
            np.testing.assert_array_equal(slopes(model, where), expected)
        with counted(device) as second:
            np.testing.assert_array_equal(slopes(model, where), expected)
        away = sum(map(bytes_of, modules[2:]))
        assert away < first["bytes"] and second["bytes"] < away / 10
        assert release(model) and not release(model)


def outside(model: PreTrainedModel) -> list[Module]:
    """What has weights and is not within the blocks."""
    decoder = model.model
    return [decoder.embed_tokens, decoder.norm, model.lm_head]


def test_tied_weights_are_onloaded_once(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make_model("llama", tie_word_embeddings=True)
    set_onload_device(model, torch.device("fake:0"))
    set_room(model, 3, monkeypatch)
    where = place(model, tiny.make_batch())
    with kept_onloaded(model, where.blocks.modules, MEMORY), counted(device) as log:
        slopes(model, where)
    assert log["bytes"] < bytes_of(model) + 2_000  # the batch, and what was measured


# --- page-locked memory ----------------------------------------------------------


@pytest.fixture
def large(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """Offloaded, with weights that are worth the detour."""
    monkeypatch.setattr(devices, "PAGE_LOCKED_FROM", 1)
    monkeypatch.setattr(devices, "_refused", {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return set_onload_device(tiny.make_model("llama"), torch.device("fake:0"))


def test_weights_come_through_page_locked_memory(
    large: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, locked = place(large, tiny.make_batch()), []
    expected = slopes(large, where)

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device.type == "cpu" and not tensor.requires_grad
        locked.append(tensor.nbytes)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    set_room(large, 1, monkeypatch)
    with kept_onloaded(large, where.blocks.modules, MEMORY):
        weight = where.blocks.modules[-1].mlp.down_proj.weight
        assert isinstance(weight, torch.nn.Parameter)
        np.testing.assert_array_equal(slopes(large, where), expected)
        once = sum(locked)
        np.testing.assert_array_equal(slopes(large, where), expected)
    # of the second round what does not stay, twice
    away = sum(map(bytes_of, where.blocks.modules[1:]))
    assert sum(locked) - once == 2 * away


def test_what_was_refused_is_not_asked_for_again(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "PAGE_LOCKED_FROM", 8)
    monkeypatch.setattr(devices, "_refused", {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    asked = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor.nbytes)
        if tensor.nbytes > 100:
            raise RuntimeError("CUDA error: out of memory")
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    there = torch.device("fake:0")
    for size, locked in ((4, False), (400, False), (80, True), (800, False)):
        tensor = torch.arange(size).to(torch.uint8)
        found = devices.through_page_locked(tensor, there)
        assert (found is not None) == locked
        if found is not None:
            assert found.device == there and torch.equal(on_host(found), tensor)
    assert asked == [400, 80]
    tensor = torch.zeros(80, dtype=torch.uint8)
    assert devices.through_page_locked(tensor, torch.device("cpu")) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # nothing would be won
    assert devices.through_page_locked(tensor, there) is None


def test_without_such_memory_they_come_all_the_same(
    large: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, asked = place(large, tiny.make_batch()), []
    expected = slopes(large, where)

    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    with kept_onloaded(large, where.blocks.modules, MEMORY):
        np.testing.assert_array_equal(slopes(large, where), expected)
        asked.clear()
        np.testing.assert_array_equal(slopes(large, where), expected)
    assert not asked


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
        assert not release(offloaded)
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
        assert not release(offloaded)


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


# --- what the pruner has made ----------------------------------------------------


def packed_weights(made: PrunedSlopes) -> list[list[Packed]]:
    """Of every Linear the three that were made."""
    kept = vars(made)["_kept"].values()
    return [weights for linears in kept for weights in linears.values()]


def on_device(made: PrunedSlopes) -> list[bool]:
    """Of every Linear, whether its pruned weights are on the device."""
    found = []
    for weights in packed_weights(made):
        assert all(isinstance(weight, Packed) for weight in weights)
        kinds = {weight.device.type for weight in weights}
        assert len(kinds) == 1
        found.append(kinds == {"fake"})
    return found


def size_of(weight: torch.Tensor) -> int:
    """Bytes of it when it is packed."""
    return -(-weight.numel() // 8) + 4 * int(weight.count_nonzero())


def made_weights(where: Any, room: int) -> tuple[PrunedModel, PrunedSlopes]:
    probe = PrunedModel(where.blocks, SparseGPT(), where.flat(), 0.1)
    probe.room = room
    run_probes(where.model, where.blocks, [tiny.make_batch(3)], [probe])
    return probe, probe.result()


@pytest.mark.parametrize("linears", [0, 3, 100])
def test_pruned_weights_stay_while_there_is_room(
    linears: int,
    device: FakeDevice,
    offloaded: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = tiny.make_model("llama")
    # on the host too by patterns of columns, which round otherwise
    monkeypatch.setattr(sparsegpt, "launches", lambda device: True)
    expected = made_weights(place(host, tiny.make_batch()), 0)[1]
    # in memory of the host itself they are as they come
    assert all(isinstance(x, torch.Tensor) for w in packed_weights(expected) for x in w)
    where = place(offloaded, tiny.make_batch())
    sizes = [sum(size_of(x) for x in w) for w in packed_weights(expected)]
    _, made = made_weights(where, sum(sizes[:linears]))
    stays = on_device(made)
    assert sum(stays) == min(linears, len(sizes)) and all(stays[:linears])
    results, moved = [], []
    for model, source in ((host, expected), (offloaded, made)):
        blocks = find_blocks(model)
        probe = GradientProbe(blocks, source.at(where.flat(0.52)))
        with counted(device) as log:
            run_probes(model, blocks, [tiny.make_batch(3)], [probe])
        results.append(numbers(probe))
        moved.append(log["bytes"])
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-6)
    # forward two of three, backward all; the last block does both in one visit
    away = packed_weights(expected)[linears:]
    last = len(where.blocks.blocks[-1].linears)
    own, less, more = (sum(size_of(w[which]) for w in away) for which in range(3))
    at_hand = sum(size_of(w[0]) + size_of(w[2]) for w in away[-last:])
    size = 2 * own + less + 2 * more - at_hand
    assert size <= moved[1] < size + 60_000 and moved[0] == 0
    assert made.release() == (linears > 0) and not any(on_device(made))
    assert not made.release()
    again = GradientProbe(where.blocks, made.at(where.flat(0.52)))
    run_probes(offloaded, where.blocks, [tiny.make_batch(3)], [again])
    np.testing.assert_allclose(numbers(again), results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["while they are made", "later"])
def test_their_room_is_given_back_too(
    which: str, device: FakeDevice, offloaded: PreTrainedModel
) -> None:
    where = place(offloaded, tiny.make_batch())
    failed: list[int] = []

    def refuse(*_: object) -> None:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("the device is full")

    last = offloaded.model.layers[-1].mlp
    if which == "while they are made":
        last.register_forward_pre_hook(refuse)
        _, made = made_weights(where, 2**30)
        assert failed and not any(on_device(made))
        return
    _, made = made_weights(where, 2**30)
    assert all(on_device(made))
    last.register_forward_pre_hook(refuse)
    probe = GradientProbe(where.blocks, made)
    run_probes(offloaded, where.blocks, [tiny.make_batch(3)], [probe])
    assert failed and not any(on_device(made))


def test_what_is_left_for_them(
    device: FakeDevice, offloaded: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the blocks that stay, be they onloaded already or not yet."""
    blocks = find_blocks(offloaded)
    sizes = [bytes_of(block) for block in blocks.modules]
    set_room(offloaded, 3, monkeypatch)
    before = spare(offloaded, blocks.modules, MEMORY)
    assert sum(sizes) <= before <= sum(sizes) + 2
    roomy = ProbeRunner(offloaded, blocks, 10**7)
    needs = (
        PROBES["model pruned by sparsegpt"]
        .make(place(offloaded, tiny.make_batch()))
        .needs
    )
    samples = [tiny.make_batch(1)] * 3
    set_room(offloaded, 3, monkeypatch, 10**7)
    assert abs(roomy.spare(needs, samples) - before) <= 2
    # one that passes its limit has taken the room of blocks that are kept
    assert ProbeRunner(offloaded, blocks, MEMORY).spare(needs, samples) == 0
    set_room(offloaded, 3, monkeypatch)
    with kept_onloaded(offloaded, blocks.modules, MEMORY) as kept:
        assert kept == 3 and spare(offloaded, blocks.modules, MEMORY) <= 2
        run_probes(offloaded, blocks, [tiny.make_batch()], [InputStatistics(blocks)])
        # the fake device does not count what is on it
        there = sum(map(bytes_of, outside(offloaded)))
        assert abs(spare(offloaded, blocks.modules, MEMORY) - before - there) <= 34
    assert spare(tiny.make_model("llama"), blocks.modules, MEMORY) == 0


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_rank_onloads_its_rows_alone(
    blocks: int,
    device: FakeDevice,
    offloaded: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = find_blocks(offloaded)
    linear = found.blocks[1].linears["mlp.down_proj"]
    with imported("imagined_ranks") as script, script.imagined_ranks(4):
        quarter = linear.weight.detach().to("cpu")[: len(linear.weight) // 4]
        # of each of these a rank's rows are a quarter
        room = 4 * blocks if blocks else 0
        set_room(offloaded, min(room, len(found)), monkeypatch)
        rows = found.linears().values()
        with kept_onloaded(offloaded, found.modules, MEMORY, rows) as kept:
            assert kept == (len(found) if blocks else 0)
            before = spare(offloaded, found.modules, 0)
            with counted(device) as log:
                first = own_rows(linear)
            # what is asked for is no longer to come
            came = quarter.nbytes if blocks else 0
            assert spare(offloaded, found.modules, 0) == before + came
            assert log["bytes"] == quarter.nbytes
            with counted(device) as log:
                second = own_rows(linear)
            assert log["bytes"] == (0 if blocks else quarter.nbytes)
            norm = offloaded.model.layers[1].input_layernorm
            for _ in range(2):
                with counted(device) as log:
                    norm.weight.detach()
            assert log["bytes"] == (0 if blocks else norm.weight.nbytes)
            assert release(offloaded) == bool(blocks)
        with counted(device) as log:
            third = own_rows(linear)
        assert log["bytes"] == quarter.nbytes
    for one in (first, second, third):
        assert one.device == torch.device("fake:0")
        assert torch.equal(on_host(one), quarter)


@pytest.mark.parametrize("slow", [False, True])
def test_rows_are_joined_where_that_is_quick(
    slow: bool, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "TRIED", 64)
    took = iter([1.0, 1.0, 1.0, 2.0, 2.0, 2.0] if slow else [1.0] * 6)

    def seconds(run: Callable[[], None], device: torch.device) -> float:
        run()
        return next(took)

    monkeypatch.setattr(joined, "_seconds", seconds)
    with imported("imagined_ranks") as script, script.imagined_ranks(4) as ranks:
        model = tiny.make_model("llama").to("fake:0")
        runner = ProbeRunner(model, find_blocks(model), "auto")
        assert runner.joins_rows == (not slow)
        assert ranks.received["all_gather"] == 3 * joined.MATRICES * 48 * 64 * 4
        away = set_onload_device(tiny.make_model("llama"), torch.device("fake:0"))
        assert ProbeRunner(away, find_blocks(away), "auto").joins_rows

        def full(run: object, device: torch.device) -> NoReturn:
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(joined, "_seconds", full)
        assert not ProbeRunner(model, find_blocks(model), "auto").joins_rows
