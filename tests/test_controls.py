"""integration/benchmarks/controls.py: as many tokens and samples as ours has."""

import math
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import naive, runs, tiny
from helpers.benchmarks import imported
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.choices import widest
from absorb_plugin.forward.graphs import KeptGraphs
from absorb_plugin.groups import linear_sizes, named
from absorb_plugin.pruners import PRUNERS, Wanda
from absorb_plugin.sample_split import SampleSplit
from absorb_plugin.search.budget import Budget
from absorb_plugin.settings import AllocationSettings

LENGTH = 24


@pytest.fixture(scope="module")
def controls() -> Iterator[ModuleType]:
    with imported("controls") as script:
        yield script


def samples(count: int, length: int = LENGTH) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tiny.VOCABULARY, (count, 1, length), generator=generator)
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def passes(model: PreTrainedModel) -> list[int]:
    """Tokens of every pass of the first block, with what is differentiated of it."""
    seen: list[int] = []

    def see(module: Any, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        # recomputed, and back through inputs and weights
        seen.append((3 if torch.is_grad_enabled() else 1) * hidden[..., 0].numel())

    # of the block itself the calls are more: what follows the blocks runs by itself too
    attention = find_blocks(model).modules[0].self_attn
    attention.register_forward_pre_hook(see, with_kwargs=True)
    return seen


@pytest.mark.parametrize("descents", [1, 2])
@pytest.mark.parametrize("kind", list(PRUNERS))
def test_tokens_are_those_that_ours_takes(
    controls: ModuleType,
    llama: PreTrainedModel,
    kind: str,
    descents: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("absorb_plugin.method.check_forward", lambda *_, **__: None)
    monkeypatch.setattr(KeptGraphs, "may_keep", lambda *_: False)
    # of random weights too the outcome of the search is taken
    monkeypatch.setattr("absorb_plugin.search.line_search.TIE", -math.inf)
    monkeypatch.setattr(
        "absorb_plugin.search.line_search.standard_error", lambda *_: -math.inf
    )
    # and no search begins anew: times that error, it is never far enough
    monkeypatch.setattr("absorb_plugin.search.confirm.CLEARLY", -math.inf)
    batches = samples(20)
    fields = {"rounds": 3, "probe_tokens": LENGTH, "descents": descents}
    seen = passes(llama)
    found = runs.allocate(
        llama, batches, kind=kind, strength="auto", signal="auto", **fields
    )
    uses = {use.use: use.tokens for use in found.samples}
    taken = sum(seen) - uses["statistics"]
    assert found.confirmed is not None
    if "halfway" in found.confirmed.losses:
        taken -= 2 * (uses["pruning"] + uses["confirm"])
    effort, columns = AllocationSettings(**fields).measuring(), widest(found.blocks)
    assert taken == controls.tokens_of(batches, effort, PRUNERS[kind](), columns)


@pytest.mark.parametrize(
    "count, length, expected",
    [(24, 256, 118_528), (64, 128, 120_832), (64, 256, 129_024)],
)
def test_tokens_of_the_benchmarks(
    controls: ModuleType, count: int, length: int, expected: int
) -> None:
    effort = AllocationSettings().measuring()
    batches = samples(count, length)
    assert controls.tokens_of(batches, effort, Wanda(), 1) == expected


def test_evolution_sees_other_windows_in_every_generation(
    controls: ModuleType, llama: PreTrainedModel
) -> None:
    blocks, seen = find_blocks(llama), []
    dense = {name: linear.weight.clone() for name, linear in blocks.linears().items()}
    llama.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    effort = AllocationSettings(probe_tokens=LENGTH).measuring()
    split = SampleSplit(samples(20), effort, judged=True, by_loss=True)
    budget, tokens = Budget.of(linear_sizes(blocks), 0.5, 0.95), 5_000
    sums = naive.square_sums(llama, blocks, tiny.make_batch(4))
    seen.clear()
    found = controls.evolve(llama, blocks, sums, split, budget, tokens=tokens, seed=0)
    assert budget.achieved(found) == pytest.approx(0.5)
    # the last generation may begin just below
    generation = (8 * 2 + 3 * 6 + 8) * LENGTH
    assert tokens <= sum(ids.numel() for ids in seen) < tokens + generation
    held_out = [one["input_ids"] for one in (*split.search, *split.confirm)]
    last = 5 * len(held_out)  # by dense, the start and three points of the path
    assert known(seen[-last:]) == known(held_out)
    assert known(seen[:-last]) == known(one["input_ids"] for one in split.in_turn())
    now = {name: linear.weight for name, linear in blocks.linears().items()}
    assert all(torch.equal(now[name], weight) for name, weight in dense.items())


def known(windows: Iterable[torch.Tensor]) -> set[tuple[int, ...]]:
    return {tuple(ids.flatten().tolist()) for ids in windows}


def test_divergence_is_that_of_the_masked_model(
    controls: ModuleType, llama: PreTrainedModel
) -> None:
    blocks, (sample,) = find_blocks(llama), samples(1)
    sums = naive.square_sums(llama, blocks, sample)
    allocation = np.full(len(blocks.linears()), 0.5)
    pruned = naive.masked(llama, sums, named(blocks, allocation))
    with torch.no_grad():
        dense, masked = (
            model(sample["input_ids"]).logits[0, :-1].log_softmax(-1)
            for model in (llama, pruned)
        )
    divergence = controls.Divergence(controls.Masked(llama, blocks, sums))
    windows = divergence.windows([sample])
    expected = (dense.exp() * (dense - masked)).sum().item()
    # the target is kept in bfloat16
    assert divergence.of(allocation, windows) == pytest.approx(expected, rel=0.02)
    divergence.of(np.zeros_like(allocation), windows)
    assert divergence.spent == 3 * LENGTH
