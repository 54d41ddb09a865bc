"""What every probe promises: its passes, no trace left, each block onloaded once."""

import importlib
import pkgutil
from collections.abc import Iterator

import compressed_tensors.offload as offload
import numpy as np
import pytest
import torch
from compressed_tensors.offload.cache import CPUCache
from helpers import tiny
from helpers.probes import JUDGES, PROBES, first_linears, numbers, place, run
from torch.nn import Module
from transformers import PreTrainedModel

import absorb_plugin
from absorb_plugin.blocks import find_blocks
from absorb_plugin.calibration import Batch
from absorb_plugin.forward import graphs
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.probe import Probe, RunBlock

every_probe = pytest.mark.parametrize("which", list(PROBES))


def subclasses(kind: type) -> Iterator[type]:
    for found in kind.__subclasses__():
        yield found
        yield from subclasses(found)


def test_no_probe_of_the_package_is_left_out(llama: PreTrainedModel) -> None:
    for module in pkgutil.walk_packages(absorb_plugin.__path__, "absorb_plugin."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    where = place(llama, tiny.make_batch())
    listed = {type(case.make(where)) for case in PROBES.values()}
    ours = {x for x in subclasses(Probe) if x.__module__.startswith("absorb_plugin.")}
    assert listed == ours
    assert set(JUDGES.values()) <= listed


@every_probe
@pytest.mark.parametrize("blocks", [2, 3])
def test_block_passes(which: str, blocks: int) -> None:
    model = tiny.make_model("llama", num_hidden_layers=blocks)
    batch = tiny.make_batch(samples=4)
    where = place(model, batch)
    probe, before = PROBES[which].make(where), tiny.snapshot(model)
    with tiny.counted(first_linears(where.blocks)) as passes:
        run(model, [batch, batch], probe)
    assert sum(passes.values()) == 2 * PROBES[which].passes(blocks)
    assert np.isfinite(numbers(probe)).all()
    tiny.assert_untouched(model, before)


class Bomb(Probe):
    def __init__(self, at: int, where: str) -> None:
        self._at, self._where = at, where

    def enter(self, index: int, block: Module) -> None:
        self._explode("enter", index)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self._explode("leave", index)

    def finish(self, batch: Batch, head: OutputHead) -> None:
        self._explode("finish", self._at)

    def _explode(self, where: str, index: int) -> None:
        if (where, index) == (self._where, self._at):
            raise RuntimeError("planted")


@every_probe
@pytest.mark.parametrize("where", ["enter", "leave", "finish"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_nothing_left_behind_by_an_error(
    llama: PreTrainedModel, where: str, which: str, first: bool
) -> None:
    batch = tiny.make_batch(samples=4)
    probe, before = PROBES[which].make(place(llama, batch)), tiny.snapshot(llama)
    with torch.no_grad():
        logits = llama(**batch).logits
    probes = [Bomb(1, where), probe] if first else [probe, Bomb(1, where)]
    with pytest.raises((RuntimeError, ValueError), match="planted"):
        run(llama, [batch], *probes)
    tiny.assert_untouched(llama, before)
    with torch.no_grad():
        assert torch.equal(llama(**batch).logits, logits)


@every_probe
def test_an_error_within_a_block_restores_it(
    llama: PreTrainedModel, which: str
) -> None:
    """At every pass through a block, under whatever weights it runs."""
    batch = tiny.make_batch(samples=4)
    where, before = place(llama, batch), tiny.snapshot(llama)
    mlp = where.blocks.blocks[1].module.mlp
    probe = PROBES[which].make(where)
    with tiny.counted({"mlp": mlp}) as passes:
        run(llama, [batch], probe)
    for number in range(1, passes["mlp"] + 1):
        probe, calls = PROBES[which].make(where), []

        def fail(module: Module, args: tuple, at: int = number, seen: list = calls):
            seen.append(module)
            if len(seen) == at:
                raise RuntimeError("planted")

        handle = mlp.register_forward_pre_hook(fail)
        with pytest.raises((RuntimeError, ValueError), match="planted"):
            run(llama, [batch], probe)
        handle.remove()
        tiny.assert_untouched(llama, before)


@pytest.fixture
def onloads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of the tensors that were copied to the device."""
    seen: list[int] = []
    onload = CPUCache.onload

    def count(self: CPUCache, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        if offloaded is not None:
            seen.append(offloaded.data_ptr())
            # a real copy, as an accelerator would make it
            return onload(self, offloaded).clone()
        return onload(self, offloaded)

    monkeypatch.setattr(CPUCache, "onload", count)
    return seen


@every_probe
def test_offloaded_weights_are_onloaded_once_per_batch(
    which: str, onloads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, results = PROBES[which], []
    batch = tiny.make_batch(samples=4)
    for offloaded in (False, True):
        model = tiny.make_model("llama")
        where = place(model, batch)
        probe = case.make(where)
        own = [p for block in where.blocks.modules for p in block.parameters()]
        everything = {parameter.data_ptr() for parameter in own}
        addresses = everything.copy()
        if not case.reads_weights:
            linears = where.blocks.linears().values()
            addresses -= {linear.weight.data_ptr() for linear in linears}
        head = model.lm_head.weight.data_ptr()
        if offloaded:
            offload.set_onload_device(model, "cpu")
            # as where they do not lie on the device
            monkeypatch.setattr(graphs, "is_offloaded", lambda module: True)
            onloads.clear()
        run(model, [batch, batch], probe)
        results.append(numbers(probe))
        if offloaded:
            mine = [address for address in onloads if address in everything]
            assert set(mine) == addresses
            assert len(mine) == 2 * case.visits * len(addresses)
            # the head: not once per trajectory and chunk. Once more in all, when
            # llm-compressor's calibration context switches it off
            assert onloads.count(head) == 1 + 2 * case.heads
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-7)


@every_probe
@pytest.mark.parametrize("architecture", ["gemma3", "qwen3_moe", "falcon_h1"])
def test_padding_and_dtype_do_no_harm(architecture: str, which: str) -> None:
    model = tiny.make_model(architecture).bfloat16()
    batch = tiny.make_batch(samples=4, padding="left")
    probe, before = PROBES[which].make(place(model, batch)), tiny.snapshot(model)
    run(model, [batch], probe)
    assert np.isfinite(numbers(probe)).all()
    tiny.assert_untouched(model, before)


SCALES = torch.linspace(0.5, 1.5, tiny.SHAPE["hidden_size"])


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("which", [n for n in PROBES if not PROBES[n].same_batch])
def test_a_users_hook_may_change_what_enters_a_block(
    which: str, memory: int | None
) -> None:
    """
    It is part of the block. One that changes what leaves the block before comes to the
    same, but that noise is added to one or the other.
    """
    found = []
    for entering in (True, False):
        model = tiny.make_model("llama")
        first, second, *_ = find_blocks(model).modules
        if entering:
            second.register_forward_pre_hook(lambda _, args: (args[0] * SCALES,))
        else:
            first.register_forward_hook(lambda *given: given[-1] * SCALES)
        batch = tiny.make_batch()
        probe = PROBES[which].make(place(model, batch))
        run(model, [batch], probe, memory=memory)
        found.append(numbers(probe))
    if "noise" not in which:
        np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-7)
