"""A run of probes against whole forwards; what every probe promises: test_probes.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import naive, runs, tiny
from helpers.probes import first_linears, run
from torch.nn import Module
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.calibration import Batch
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.loss import cross_entropy_sums
from absorb_plugin.forward.memory import footprint
from absorb_plugin.forward.probe import Probe, RunBlock
from absorb_plugin.forward.replaced import replaced_forward
from absorb_plugin.forward.run import NonFiniteHiddenState, run_probes
from absorb_plugin.signals.noise import NoiseProbe


class Keeper(Probe):
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

    def finish(self, batch: Batch, head: OutputHead) -> None:
        tokens = batch["input_ids"].shape[1]
        parts = [
            head.logits(batch["input_ids"], self.last, start, min(start + 5, tokens))
            for start in range(0, tokens, 5)
        ]
        self.logits.append(torch.cat(parts, dim=1))


def test_states_and_logits_are_the_models_own(any_model: PreTrainedModel) -> None:
    batch, before = tiny.make_batch(), tiny.snapshot(any_model)
    keeper = Keeper()
    run(any_model, [batch], keeper)
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
    run(llama, [batch], plain)
    blocks = find_blocks(llama)
    for block in blocks.modules:
        block.forward = returning_a_tuple(block.forward)
    llama.model.layers = torch.nn.ModuleList(map(TakesTuples, blocks.modules))
    run_probes(llama, blocks, [batch], [wrapped])
    torch.testing.assert_close(wrapped.logits, plain.logits, rtol=0, atol=0)


class Onward(Probe):
    """Has the model's own pass go on with another hidden state."""

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> torch.Tensor:
        return 2 * after


@pytest.mark.parametrize("tuples", [False, True])
def test_the_models_own_pass_goes_on_with_what_a_probe_returns(
    llama: PreTrainedModel, tuples: bool
) -> None:
    blocks, batch = find_blocks(llama), tiny.make_batch()
    expected = naive.states(llama, blocks.modules, batch, 0, lambda x: 2 * x)[0]
    probe, seen = Onward(), []
    handle = blocks.modules[1].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    if tuples:
        for block in blocks.modules:
            block.forward = returning_a_tuple(block.forward)
        llama.model.layers = torch.nn.ModuleList(map(TakesTuples, blocks.modules))
    run_probes(llama, blocks, [batch], [probe])
    handle.remove()
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)


def test_a_hook_of_the_users_on_the_last_block_fires_once(
    llama: PreTrainedModel,
) -> None:
    blocks, calls = find_blocks(llama), []

    def double(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> Any:
        calls.append(module)
        return 2 * output

    blocks.modules[-1].register_forward_hook(double)
    batch = tiny.make_batch()
    expected = naive.loss_sums(llama, batch)
    calls.clear()
    probe = Scored()
    run_probes(llama, blocks, [batch], [probe])
    assert len(calls) == 1
    torch.testing.assert_close(torch.tensor(probe.losses), expected)
    runs.allocate(llama, [tiny.make_batch(4)], strength="auto")


class Scored(Probe):
    """The model's own loss, by its last hidden state."""

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self._last = after

    def finish(self, batch: Batch, head: OutputHead) -> None:
        found = cross_entropy_sums(head, batch, self._last)
        self.losses = [total for total, _ in found]


def test_noise_runs_through_later_blocks_alone(any_model: PreTrainedModel) -> None:
    blocks = find_blocks(any_model)
    count = len(blocks)
    batches = [tiny.make_batch(seed=seed) for seed in range(2)]
    with tiny.counted(first_linears(blocks)) as passes:
        run(any_model, batches, NoiseProbe(range(count), count, 1e-2, 0))
    # the rounding floor's trajectory starts after the first block
    assert list(passes.values()) == [2] + [2 * (k + 2) for k in range(1, count)]


def test_non_finite_hidden_state_names_the_block(llama: PreTrainedModel) -> None:
    blocks = find_blocks(llama)
    blocks.blocks[1].module.mlp.down_proj.weight.data[0, 0] = torch.nan
    before = [t.nan_to_num(7.0) for t in tiny.snapshot(llama).values()]
    with pytest.raises(NonFiniteHiddenState, match=r"block model\.layers\.1 "):
        run(llama, [tiny.make_batch()], NoiseProbe(range(3), 3, 1e-2, 0))
    after = [t.nan_to_num(7.0) for t in tiny.snapshot(llama).values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not blocks.blocks[0].module._forward_hooks


class Sizes(Probe):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def start(self, batch: Batch) -> None:
        self.seen.append(len(batch["input_ids"]))


def test_memory_limit_splits_batches_with_equal_results(
    llama: PreTrainedModel,
) -> None:
    batch = tiny.make_batch(samples=4)
    sizes, profiles = Sizes(), []
    probe = NoiseProbe(range(3), 3, 1e-2, 0)
    need = footprint(llama, find_blocks(llama).modules, [probe.needs], memory=1)
    # what is not chunks of logits has 11 of 16 parts
    four, three, one = (n * need.sample(12) * 16 // 11 + 32 for n in (4, 3, 1))
    for memory in (None, four, three, one, 1):
        probe = NoiseProbe(range(3), 3, 1e-2, 0)
        run(llama, [batch], probe, sizes, memory=memory)
        profiles.append(probe.result())
    assert sizes.seen == [4, 4, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
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
