"""A device that is full: fewer samples at a time, and the same result."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.probes import PROBES, first_linears, numbers, place
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.forward.probe import Probe
from absorb_plugin.forward.run import run_probes
from absorb_plugin.pruners import SparseGPT

TOGETHER = ("pruner of", "model pruned", "second moments")
AT_ONCE = {name for name in PROBES if name.startswith(TOGETHER)}
DIVISIBLE = [
    name for name, case in PROBES.items() if name not in AT_ONCE and not case.same_batch
]
NUMBER = count()  # of runs: each says once that memory was short


@pytest.fixture
def small_device(llama: PreTrainedModel) -> Iterator[list[int]]:
    """The last block's MLP has room for two samples. Sizes of all that it was given."""
    seen: list[int] = []

    def refuse(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        seen.append(len(args[0]))
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("the device is full")

    llama.model.layers[-1].mlp.register_forward_pre_hook(refuse)
    yield seen


def run(model: PreTrainedModel, probe: Probe, samples: int) -> None:
    batches = [tiny.make_batch(samples, seed=seed) for seed in range(2)]
    what = f"Run {next(NUMBER)}"
    run_probes(model, find_blocks(model), batches, [probe], description=what)


@pytest.mark.parametrize("which", DIVISIBLE)
def test_halves(
    which: str, llama: PreTrainedModel, small_device: list[int], warnings: list[str]
) -> None:
    where = place(tiny.make_model("llama"), tiny.make_batch())
    small = place(llama, tiny.make_batch(), where.statistics)
    expected, found = (PROBES[which].make(x) for x in (where, small))
    run(where.model, expected, 5)
    run(llama, found, 5)
    assert max(small_device) == 5 and set(small_device) >= {5, 2, 1}
    results = numbers(found), numbers(expected)
    np.testing.assert_allclose(*results, rtol=2e-4, atol=1e-6)
    assert sum("does not fit" in message for message in warnings) == 1


def test_one_sample_that_does_not_fit(llama: PreTrainedModel) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("the device is full")

    before = tiny.snapshot(llama)
    probe = PROBES["slope under masks"].make(place(llama, tiny.make_batch()))
    hook = llama.model.layers[1].mlp.register_forward_pre_hook(refuse)
    with pytest.raises(torch.OutOfMemoryError, match="single sample: use fewer"):
        run(llama, probe, 4)
    hook.remove()
    tiny.assert_untouched(llama, before)


def test_candidates_go_one_at_a_time_before_samples_do(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """Their Hessians at once are what does not fit; fewer samples would not help."""
    name, sets = "pruner of all candidates at once", []
    where = place(tiny.make_model("llama"), tiny.make_batch())
    expected, found = (
        PROBES[name].make(place(model, tiny.make_batch(), where.statistics))
        for model in (where.model, llama)
    )
    run_probes(where.model, where.blocks, [tiny.make_batch(4)], [expected])
    original = SparseGPT.prune_each

    def refuse(self: SparseGPT, weights: Any, observed: Any, *rest: Any) -> Any:
        sets.append(len(observed))
        if len(observed) > 1:
            raise torch.OutOfMemoryError("the device is full")
        return original(self, weights, observed, *rest)

    monkeypatch.setattr(SparseGPT, "prune_each", refuse)
    run_probes(llama, find_blocks(llama), [tiny.make_batch(4)], [found])
    assert sets[0] == 3 and set(sets[1:]) == {1}
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-3)
    assert not any("does not fit" in message for message in warnings)


def test_in_parts_batches_are_halved_last(
    llama: PreTrainedModel, warnings: list[str]
) -> None:
    """First fewer samples at a time; of a batch that does not fit even so, a half."""
    roomy = tiny.make_model("llama")
    batch = tiny.make_batch(4)
    batches, at_a_time = [], []

    def refuse_batch(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        batches.append(len(kwargs.get("hidden_states", args[0] if args else None)))

    def refuse(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        at_a_time.append(len(args[0]))
        if batches[-1] > 2:
            raise torch.OutOfMemoryError("the device is full")

    found, expected = (
        PROBES["statistics"].make(place(model, tiny.make_batch()))
        for model in (llama, roomy)
    )
    last = llama.model.layers[-1]
    last.register_forward_pre_hook(refuse_batch, with_kwargs=True)
    last.mlp.register_forward_pre_hook(refuse)
    what = f"Run {next(NUMBER)}"
    blocks = find_blocks(llama)
    run_probes(llama, blocks, [batch], [found], in_parts=True, description=what)
    run_probes(roomy, find_blocks(roomy), [batch], [expected])
    assert batches == [4, 4, 4, 2, 2] and at_a_time == [4, 2, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-4)
    assert sum("does not fit" in message for message in warnings) == 1


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("which", sorted(AT_ONCE))
def test_what_must_stay_whole_runs_in_parts(which: str, architecture: str) -> None:
    """Of unequal length, so that the parts of the masks count."""
    model = tiny.make_model(architecture)
    batch = tiny.make_batch(5, padding="right")
    where = place(model, batch)
    results = []
    for memory in (None, 1):
        probe, most = PROBES[which].make(where), []
        hook = first_linears(where.blocks)[where.blocks.blocks[0].name]
        note = hook.register_forward_pre_hook(lambda _, x, m=most: m.append(len(x[0])))
        run_probes(model, where.blocks, [batch], [probe], memory=memory)
        note.remove()
        results.append(numbers(probe))
        assert max(most) == (5 if memory is None else 1)
    # sums in another order may move a weight across SparseGPT's threshold
    np.testing.assert_allclose(*results, rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("which", sorted(AT_ONCE))
def test_what_must_stay_whole_and_does_not_fit(
    which: str, llama: PreTrainedModel, small_device: list[int], warnings: list[str]
) -> None:
    roomy = place(tiny.make_model("llama"), tiny.make_batch())
    expected = PROBES[which].make(roomy)
    run(roomy.model, expected, 4)
    found = PROBES[which].make(place(llama, tiny.make_batch(), roomy.statistics))
    run(llama, found, 4)
    results = numbers(found), numbers(expected)
    np.testing.assert_allclose(*results, rtol=2e-3, atol=1e-5)
    assert sum("does not fit" in message for message in warnings) == 1
