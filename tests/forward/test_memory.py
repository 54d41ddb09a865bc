"""What sweeps really take, against the limit that they are given."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from absorb_plugin.absorption import NoiseProbe
from absorb_plugin.compensation import Compensation
from absorb_plugin.gradient import GradientProbe
from absorb_plugin.memory import Footprint, footprint
from absorb_plugin.rehearsal import Rehearsal
from absorb_plugin.response import CandidateScores, ResponseProbe
from absorb_plugin.statistics import InputStatistics
from absorb_plugin.sweep import Passenger, sweep
from helpers import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from absorb_plugin.blocks import BlockMap, find_blocks


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and remembers the most."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self._known = known  # addresses that do not count
        self._alive: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, output)):
            # the head that calibration contexts switch off computes on "meta"
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._known or address in self._alive:
            return
        self._alive[address] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        self._references[address] = weakref.ref(storage, self._forget(address))

    def _forget(self, address: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self.now -= self._alive.pop(address)
            del self._references[address]

        return forget


@contextmanager
def live_bytes(*owners: Any) -> Iterator[LiveBytes]:
    """:param owners: modules or mappings whose tensors do not count"""
    known = set()
    for owner in owners:
        tensors = owner if isinstance(owner, Mapping) else owner.state_dict()
        known |= {t.untyped_storage().data_ptr() for t in tensors.values()}
    with LiveBytes(known) as live:
        yield live


def passenger(which: str, blocks: BlockMap, sums: dict) -> Passenger:
    flat, count = np.full(len(blocks), 0.5), len(blocks)
    if which == "noise":
        return NoiseProbe(range(count), count, 1e-2, 0)
    if which == "statistics":
        return InputStatistics(blocks)
    if which == "response":
        return ResponseProbe(blocks, sums, flat, 0.1)
    if which == "gradient":
        return GradientProbe(blocks, sums, flat, 0.1)
    if which == "rehearsal":
        return Rehearsal(blocks, sums, [flat] * 3, Compensation(), 2)
    return CandidateScores(blocks, sums, [flat] * 6)


PASSENGERS = [
    "noise",
    "statistics",
    "response",
    "gradient",
    "candidates",
    "rehearsal",
]
# hidden states, weights, attention scores and logits in turn take the most
SHAPES = {
    "states": ({"num_hidden_layers": 6}, 64),
    "weights": ({"hidden_size": 128, "intermediate_size": 512}, 8),
    "attention": ({"max_position_embeddings": 192}, 192),
    "logits": ({"vocab_size": 4096}, 32),
    "experts": ({}, 32),
    "halves": ({"hidden_size": 128, "intermediate_size": 512}, 8),
}


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("which", PASSENGERS)
def test_a_sweep_keeps_to_its_memory(which: str, shape: str) -> None:
    fields, tokens = SHAPES[shape]
    architecture = "qwen3_moe" if shape == "experts" else "llama"
    model = tiny.make_model(architecture, **fields)
    if shape == "halves":
        model = model.half()
    blocks = find_blocks(model)
    names = [block.name for block in blocks.blocks]
    sums = {
        name: torch.rand(linear.in_features) + 0.1
        for name, linear in blocks.linears().items()
    }
    batch = tiny.make_batch(4, tokens)
    least = footprint(model, blocks.modules, [passenger(which, blocks, sums)], memory=1)
    shares = []
    for samples in (4,) if which == "rehearsal" else (1, 4):  # it is not cut
        # what is not chunks of logits has 11 of 16 parts
        limit = (least.fixed + samples * least.sample(tokens)) * 16 // 11
        one = passenger(which, blocks, sums)
        with live_bytes(model, sums, batch) as live:
            sweep(model, blocks.modules, names, [batch], [one], memory=limit)
        shares.append(live.peak / limit)
    assert max(shares) <= 1


def test_samples_at_a_time() -> None:
    need = Footprint(fixed=100, chunk=1, per_token=2, per_pair=1)
    assert need.sample(4) == 24
    assert [need.samples(4, memory) for memory in (101, 124, 148, 195)] == [1, 1, 2, 3]
    # the limit cannot be kept: going through the model once per sample would not help
    assert [need.samples(4, memory) for memory in (100, 96, 1)] == [1, 1, 1]
    assert Footprint(500, 1, 2, 1).samples(4, 480) == 5


def test_what_cannot_be_kept_is_said_once(warnings: list[str]) -> None:
    model = tiny.make_model("llama")
    blocks = find_blocks(model)
    names = [block.name for block in blocks.blocks]
    sums = {name: torch.ones(x.in_features) for name, x in blocks.linears().items()}
    for _ in range(2):
        one = passenger("candidates", blocks, sums)
        batch = tiny.make_batch(2, 11)
        sweep(model, blocks.modules, names, [batch], [one], memory=5_000)
    told = [message for message in warnings if "sweep_memory" in message]
    assert len(told) == 1 and "x 11 tokens" in told[0]
