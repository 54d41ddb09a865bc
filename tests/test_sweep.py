"""The sweep against whole forwards: costs, equality, and no trace left behind."""

from collections.abc import Callable

import compressed_tensors.offload as offload
import numpy as np
import pytest
import torch
from absorb_plugin.absorption import NoiseProbe
from absorb_plugin.compensation import Compensation
from absorb_plugin.gradient import GradientProbe
from absorb_plugin.memory import footprint
from absorb_plugin.rehearsal import Rehearsal
from absorb_plugin.response import CandidateScores, ResponseProbe
from absorb_plugin.statistics import InputStatistics
from absorb_plugin.sweep import (
    NonFiniteHiddenState,
    Passenger,
    RunBlock,
    Tail,
    replaced_forward,
    sweep,
)
from compressed_tensors.offload.cache import CPUCache
from helpers import naive, tiny
from torch.nn import Module
from transformers import PreTrainedModel

from absorb_plugin.blocks import BlockMap, find_blocks
from absorb_plugin.calibration import Batch


def ride(
    model: PreTrainedModel,
    batches: list[dict],
    *passengers: Passenger,
    memory: int | None = None,
) -> None:
    blocks = find_blocks(model)
    names = [block.name for block in blocks.blocks]
    sweep(model, blocks.modules, names, batches, passengers, memory=memory)


def first_linears(blocks: BlockMap) -> dict[str, Module]:
    """One Linear of each block, run exactly once whenever the block is."""
    return {b.name: next(iter(b.linears.values())) for b in blocks.blocks}


class Keeper(Passenger):
    """Keeps the hidden states, the logits and the sizes of the batches."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        torch.testing.assert_close(run(before), after, rtol=0, atol=0)
        self.last = after
        self.states.append(after)

    def finish(self, batch: Batch, tail: Tail) -> None:
        tokens = batch["input_ids"].shape[1]
        parts = [
            tail.logits(batch["input_ids"], self.last, start, min(start + 5, tokens))
            for start in range(0, tokens, 5)
        ]
        self.logits.append(torch.cat(parts, dim=1))


def test_states_and_logits_are_the_models_own(any_model: PreTrainedModel) -> None:
    batch, before = tiny.make_batch(), tiny.snapshot(any_model)
    keeper = Keeper()
    ride(any_model, [batch], keeper)
    expected = naive.states(any_model, find_blocks(any_model).modules, batch)
    for state, reference in zip(keeper.states, expected, strict=True):
        torch.testing.assert_close(state, reference, rtol=0, atol=0)
    with torch.no_grad():
        logits = any_model(**batch).logits
    torch.testing.assert_close(keeper.logits[0], logits, rtol=1e-5, atol=1e-6)
    tiny.assert_untouched(any_model, before)


def returning_a_tuple(forward: Callable[..., torch.Tensor]) -> Callable[..., tuple]:
    return lambda *args, **kwargs: (forward(*args, **kwargs), None)


class TakesTuples(Module):
    """What older models do in their loop over the blocks."""

    def __init__(self, block: Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        output = self.block(*args, **kwargs)
        assert isinstance(output, tuple)
        return output[0]


def test_blocks_that_return_tuples(llama: PreTrainedModel) -> None:
    batch = tiny.make_batch()
    plain, wrapped = Keeper(), Keeper()
    ride(llama, [batch], plain)
    blocks = find_blocks(llama)
    for block in blocks.modules:
        block.forward = returning_a_tuple(block.forward)
    llama.model.layers = torch.nn.ModuleList(map(TakesTuples, blocks.modules))
    names = [block.name for block in blocks.blocks]
    sweep(llama, blocks.modules, names, [batch], [wrapped])
    torch.testing.assert_close(wrapped.logits, plain.logits, rtol=0, atol=0)


def test_noise_probe_costs_half_a_square_of_block_passes(
    any_model: PreTrainedModel,
) -> None:
    blocks = find_blocks(any_model)
    count = len(blocks)
    batches = [tiny.make_batch(seed=seed) for seed in range(2)]
    with tiny.counted(first_linears(blocks)) as passes:
        ride(any_model, batches, NoiseProbe(range(count), count, 1e-2, 0))
    # the rounding floor's trajectory starts behind the first block
    assert list(passes.values()) == [2] + [2 * (k + 2) for k in range(1, count)]
    assert sum(passes.values()) == 2 * (count * (count + 1) // 2 + count - 1)


def passengers_of(blocks: BlockMap, batch: Batch, model: PreTrainedModel) -> dict:
    sums = naive.square_sums(model, blocks, batch)
    count = len(blocks)
    flat = np.full(count, 0.5)
    return {
        "statistics": (InputStatistics(blocks), count),
        "response": (ResponseProbe(blocks, sums, flat, 0.1), count * (count + 3) // 2),
        "gradient": (GradientProbe(blocks, sums, flat, 0.1), 2 * count),
        "candidates": (CandidateScores(blocks, sums, [flat] * 4), 4 * count),
        # twice through every block, for the first the model's own pass is one of them
        "rehearsal": (
            Rehearsal(blocks, sums, [flat] * 3, Compensation(), 2),
            6 * count,
        ),
    }


@pytest.mark.parametrize(
    "which", ["statistics", "response", "gradient", "candidates", "rehearsal"]
)
def test_block_passes_of_the_other_passengers(
    llama: PreTrainedModel, which: str
) -> None:
    blocks, batch = find_blocks(llama), tiny.make_batch()
    passenger, expected = passengers_of(blocks, batch, llama)[which]
    before = tiny.snapshot(llama)
    with tiny.counted(first_linears(blocks)) as passes:
        ride(llama, [batch], passenger)
    assert sum(passes.values()) == expected
    tiny.assert_untouched(llama, before)


class Bomb(Passenger):
    def __init__(self, at: int, where: str) -> None:
        self._at, self._where = at, where

    def enter(self, index: int, block: Module) -> None:
        self._explode("enter", index)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self._explode("leave", index)

    def finish(self, batch: Batch, tail: Tail) -> None:
        self._explode("finish", self._at)

    def _explode(self, where: str, index: int) -> None:
        if (where, index) == (self._where, self._at):
            raise RuntimeError("planted")


@pytest.mark.parametrize("where", ["enter", "leave", "finish"])
@pytest.mark.parametrize("which", ["statistics", "response", "gradient", "candidates"])
def test_nothing_left_behind_by_an_error(
    llama: PreTrainedModel, where: str, which: str
) -> None:
    blocks, batch = find_blocks(llama), tiny.make_batch()
    passenger, _ = passengers_of(blocks, batch, llama)[which]
    before = tiny.snapshot(llama)
    with torch.no_grad():
        logits = llama(**batch).logits
    with pytest.raises(RuntimeError, match="planted"):
        ride(llama, [batch], passenger, Bomb(1, where))
    tiny.assert_untouched(llama, before)
    with torch.no_grad():
        assert torch.equal(llama(**batch).logits, logits)


def test_an_error_within_a_masked_block_restores_it(llama: PreTrainedModel) -> None:
    blocks, batch = find_blocks(llama), tiny.make_batch()
    probe, _ = passengers_of(blocks, batch, llama)["response"]
    before, calls = tiny.snapshot(llama), []

    def fail_at_the_second_pass(module: Module, args: tuple) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise RuntimeError("planted")

    handle = blocks.blocks[1].module.mlp.register_forward_pre_hook(
        fail_at_the_second_pass
    )
    with pytest.raises(RuntimeError, match="planted"):
        ride(llama, [batch], probe)
    handle.remove()
    tiny.assert_untouched(llama, before)


def test_non_finite_hidden_state_names_the_block(llama: PreTrainedModel) -> None:
    blocks = find_blocks(llama)
    blocks.blocks[1].module.mlp.down_proj.weight.data[0, 0] = torch.nan
    before = [t.nan_to_num(7.0) for t in tiny.snapshot(llama).values()]
    with pytest.raises(NonFiniteHiddenState, match=r"block model\.layers\.1 "):
        ride(llama, [tiny.make_batch()], NoiseProbe(range(3), 3, 1e-2, 0))
    after = [t.nan_to_num(7.0) for t in tiny.snapshot(llama).values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not blocks.blocks[0].module._forward_hooks


def test_memory_limit_splits_batches_with_equal_results(
    llama: PreTrainedModel,
) -> None:
    batch = tiny.make_batch(samples=4)
    sizes: list[int] = []

    class Sizes(Passenger):
        def start(self, batch: Batch) -> None:
            sizes.append(len(batch["input_ids"]))

    profiles = []
    probe = NoiseProbe(range(3), 3, 1e-2, 0)
    need = footprint(llama, find_blocks(llama).modules, [probe], memory=1)
    # what is not chunks of logits has 11 of 16 parts
    four, three, one = (n * need.sample(12) * 16 // 11 + 32 for n in (4, 3, 1))
    for memory in (None, four, three, one, 1):
        probe = NoiseProbe(range(3), 3, 1e-2, 0)
        ride(llama, [batch], probe, Sizes(), memory=memory)
        profiles.append(probe.profile())
    assert sizes == [4, 4, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    for profile in profiles[1:]:
        np.testing.assert_allclose(profile.drift, profiles[0].drift, rtol=1e-5)
        np.testing.assert_allclose(profile.ratio, profiles[0].ratio, rtol=1e-5)


def test_replaced_forward_puts_back_what_was_there() -> None:
    module = torch.nn.Linear(2, 2)
    with replaced_forward(module, lambda x: x + 1):
        assert module(torch.zeros(2)).tolist() == [1.0, 1.0]
        with replaced_forward(module, lambda x: x + 2):
            assert module(torch.zeros(2)).tolist() == [2.0, 2.0]
        assert module(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert "forward" not in module.__dict__


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


@pytest.mark.parametrize(
    "which", ["noise", "statistics", "response", "gradient", "candidates"]
)
def test_offloaded_weights_are_onloaded_once_per_batch(
    which: str, onloads: list[int]
) -> None:
    batch, results = tiny.make_batch(), []
    for offloaded in (False, True):
        model = tiny.make_model("llama")
        blocks = find_blocks(model)
        found = passengers_of(blocks, batch, model)
        found["noise"] = (NoiseProbe(range(3), 3, 1e-2, 0), 0)
        passenger, _ = found[which]
        addresses = {
            p.data_ptr() for block in blocks.modules for p in block.parameters()
        }
        head = model.lm_head.weight.data_ptr()
        if offloaded:
            offload.set_onload_device(model, "cpu")
            onloads.clear()
        ride(model, [batch, batch], passenger)
        results.append(numbers(passenger))
        if offloaded:
            mine = [address for address in onloads if address in addresses]
            assert set(mine) == addresses
            # the gradient comes back to every block
            visits = 2 if which == "gradient" else 1
            assert len(mine) == 2 * visits * len(addresses)
            # the head: not once per trajectory and chunk. Once more in all, when
            # llm-compressor's calibration context switches it off
            scores = which not in ("noise", "statistics")
            assert onloads.count(head) == 1 + 2 * scores
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6)


def numbers(passenger: Passenger) -> np.ndarray:
    if isinstance(passenger, NoiseProbe):
        return passenger.profile().ratio
    if isinstance(passenger, ResponseProbe):
        return passenger.response().response
    if isinstance(passenger, CandidateScores):
        return passenger.losses()[0]
    if isinstance(passenger, GradientProbe):
        return passenger.slope()
    assert isinstance(passenger, InputStatistics)
    return torch.cat(list(passenger.input_square_sums().values())).numpy()
