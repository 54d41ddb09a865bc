"""A device that is full: fewer samples at a time, and the same result."""

from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
import tiny
import torch
from helpers.probes import PROBES, SINGLE_BATCH, make_probe, square_sums
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.forward.probe import Probe
from absorb_plugin.forward.run import run_probes

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


def flat(result: object) -> list[np.ndarray]:
    """All numbers of a result."""
    if isinstance(result, tuple):
        return [np.asarray(x, dtype=float) for x in result]
    if isinstance(result, dict):
        return [np.asarray(x) for x in result.values()]
    if hasattr(result, "__dict__"):
        values = vars(result).values()
        return [x for x in values if isinstance(x, np.ndarray | float)]
    return [np.asarray(result)]


@pytest.mark.parametrize("which", sorted({*PROBES} - {*SINGLE_BATCH}))
def test_halves(
    which: str, llama: PreTrainedModel, small_device: list[int], warnings: list[str]
) -> None:
    torch.manual_seed(0)
    blocks = find_blocks(llama)
    sums, roomy = square_sums(blocks), tiny.make_model("llama")
    other = find_blocks(roomy)
    expected = make_probe(which, other, sums)
    run(roomy, expected, 5)
    found = make_probe(which, blocks, sums)
    run(llama, found, 5)
    assert max(small_device) == 5 and set(small_device) >= {5, 2, 1}
    for one, two in zip(flat(found.result()), flat(expected.result()), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=1e-6)
    assert sum("does not fit" in message for message in warnings) == 1


def test_one_sample_that_does_not_fit(llama: PreTrainedModel) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("the device is full")

    hook = llama.model.layers[1].mlp.register_forward_pre_hook(refuse)
    before = tiny.snapshot(llama)
    blocks = find_blocks(llama)
    probe = make_probe("gradient", blocks, square_sums(blocks))
    with pytest.raises(torch.OutOfMemoryError, match="single sample: use fewer"):
        run(llama, probe, 4)
    hook.remove()
    tiny.assert_untouched(llama, before)


@pytest.mark.parametrize("which", SINGLE_BATCH)
def test_what_takes_all_samples_at_once(
    which: str, llama: PreTrainedModel, small_device: list[int]
) -> None:
    blocks = find_blocks(llama)
    probe = make_probe(which, blocks, square_sums(blocks))
    with pytest.raises(torch.OutOfMemoryError, match="use fewer confirm_samples"):
        run(llama, probe, 4)
