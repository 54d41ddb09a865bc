"""What runs of probes really take, against the limit that they are given."""

import psutil
import pytest
import torch
from compressed_tensors.offload import set_onload_device
from helpers import tiny
from helpers.benchmarks import imported
from helpers.fake_accelerator import fake_accelerator
from helpers.live_bytes import live_bytes
from helpers.probes import PROBES, Place, place, run

from absorb_plugin.blocks import find_blocks
from absorb_plugin.cpu import bfloat16_is_slow
from absorb_plugin.forward import memory
from absorb_plugin.forward.memory import Footprint, footprint, limit_by_machine
from absorb_plugin.forward.probe import Needs, Probe
from absorb_plugin.judges import MaskedLoss
from absorb_plugin.pruners import PRUNERS, factor, sparsegpt, together
from absorb_plugin.pruners.masks import MaskedWeights
from absorb_plugin.pruners.slopes import MaskedSlopes
from absorb_plugin.signals.gradient import GradientProbe
from absorb_plugin.signals.pruned_model import PrunedModel

GIB = 2**30
bfloat16_is_slow()  # tried out once, and that is no part of any run
# hidden states, weights, attention scores and logits in turn take the most
SHAPES = {
    "states": ({"num_hidden_layers": 6}, 64),
    "weights": ({"hidden_size": 128, "intermediate_size": 512}, 8),
    "attention": ({"max_position_embeddings": 192}, 192),
    "logits": ({"vocab_size": 4096}, 32),
    "experts": ({}, 32),
    "large experts": (
        {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 16},
        8,
    ),
    "halves": ({"hidden_size": 128, "intermediate_size": 512}, 8),
}


ALONE = [(name, False) for name in PROBES if not PROBES[name].same_batch]


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize(
    "which, launches",
    [
        *ALONE,
        ("model pruned by sparsegpt", True),
        ("pruner of sparsegpt", True),
        ("pruner of all candidates at once", True),
    ],
)
def test_a_run_keeps_to_its_memory(
    which: str, launches: bool, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """:param launches: columns as an accelerator walks them"""
    if launches:
        for one in (sparsegpt, memory):
            monkeypatch.setattr(one, "launches", lambda device: True)
    fields, tokens = SHAPES[shape]
    architecture = "qwen3_moe" if "experts" in shape else "llama"
    model = tiny.make_model(architecture, **fields)
    if shape == "halves":
        model = model.half()
    batch = tiny.make_batch(4, tokens)
    where, case = place(model, batch), PROBES[which]
    needs = case.make(where).needs
    least = footprint(model, where.blocks.modules, [needs], memory=1)
    shares = []
    for samples in (4,) if needs.single_batch else (1, 4):  # it is not cut
        # what is not chunks of logits has 11 of 16 parts
        limit = (least.fixed + samples * least.sample(tokens)) * 16 // 11
        probe = case.make(where)
        with live_bytes(model, where.statistics, batch) as live:
            run(model, [batch], probe, memory=limit)
        shares.append(live.peak / limit)
    assert max(shares) <= 1


def rows_of_masks(where: Place) -> MaskedWeights:
    masks = PRUNERS["wanda"]().masks
    return MaskedWeights(where.blocks, masks, where.statistics, joined=True)


def joined_slopes(where: Place) -> Probe:
    slopes = MaskedSlopes(where.blocks, rows_of_masks(where), where.flat(), 0.1)
    return GradientProbe(where.blocks, slopes)


def joined_masks(where: Place) -> Probe:
    return MaskedLoss(where.blocks, rows_of_masks(where), where.candidates())


def joined_copies(where: Place) -> PrunedModel:
    made = PrunedModel(where.blocks, PRUNERS["sparsegpt"](), where.flat(), 0.1)
    made.joined = True
    return made


def joined_copies_slopes(where: Place) -> Probe:
    made = joined_copies(where)
    run(where.model, [tiny.make_batch(4, 8)], made)
    return GradientProbe(where.blocks, made.result())


JOINED = {
    "slopes": joined_slopes,
    "masks": joined_masks,
    "pruned": joined_copies,
    "pruned slopes": joined_copies_slopes,
    "judge": PROBES["pruner of sparsegpt"].make,
}


@pytest.mark.parametrize("shape", ["states", "weights", "experts", "halves"])
@pytest.mark.parametrize(
    "which, wide",
    [*((name, False) for name in JOINED), ("pruned", True), ("judge", True)],
)
def test_a_rank_keeps_to_its_memory(
    which: str, wide: bool, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:  # factored by all ranks, and its columns as an accelerator walks them
        monkeypatch.setattr(together, "WIDE", 1)
        monkeypatch.setattr(factor, "PANEL", 32)
        for one in (sparsegpt, memory):
            monkeypatch.setattr(one, "launches", lambda device: True)
    fields, tokens = SHAPES[shape]
    model = tiny.make_model("qwen3_moe" if shape == "experts" else "llama", **fields)
    if shape == "halves":
        model = model.half()
    batch = tiny.make_batch(4, tokens)
    with imported("imagined_ranks") as script, script.imagined_ranks(4) as ranks:
        where = place(model, batch)
        probe = JOINED[which](where)
        need = footprint(model, where.blocks.modules, [probe.needs], memory=1)
        limit = (need.fixed + 4 * need.sample(tokens)) * 16 // 11
        before = sum(ranks.received.values())
        with live_bytes(model, where.statistics, batch) as live:
            run(model, [batch], probe, memory=limit)
        assert sum(ranks.received.values()) > before
    assert live.peak <= limit


def test_samples_at_a_time() -> None:
    need = Footprint(fixed=100, chunk=1, per_state=1, per_token=1, per_pair=1)
    assert need.sample(4) == 24
    assert [need.samples(4, memory) for memory in (101, 124, 148, 195)] == [1, 1, 2, 3]
    # the limit cannot be kept: going through the model once per sample would not help
    assert [need.samples(4, memory) for memory in (100, 96, 1)] == [1, 1, 1]
    # all states are kept, and what is left is for the block that runs
    assert [need.part(3, 4, memory) for memory in (1, 112, 132, 152, 999)] == [
        1,
        1,
        1,
        2,
        3,
    ]
    assert Footprint(500, 1, 1, 1, 1).samples(4, 480) == 5
    # a quarter of 400 beyond the limit, or what is left where that is more
    over, tight = Footprint(500, 1, 1, 1, 1), Footprint(380, 1, 1, 1, 1)
    assert over.part(9, 4, 400) == tight.part(9, 4, 400) == 100 // 20


def test_what_cannot_be_kept_is_said_once(warnings: list[str]) -> None:
    model = tiny.make_model("llama")
    where = place(model, tiny.make_batch())
    for _ in range(2):
        probe = PROBES["masks of wanda"].make(where)
        run(model, [tiny.make_batch(2, 11)], probe, memory=5_000)
    told = [message for message in warnings if "probe_memory" in message]
    assert len(told) == 1 and "x 11 tokens" in told[0]


def test_an_expert_block_is_pruned_one_linear_at_a_time() -> None:
    """11 G weights a block, as the largest mixtures have them."""
    with torch.device("meta"):
        experts = torch.nn.ModuleList(
            torch.nn.Linear(7168, 2048, bias=False) for _ in range(768)
        )
        model = tiny.make_model("llama").to("meta").bfloat16()
    weights = 768 * 7168 * 2048
    needs = Needs(trajectories=3, pruned=4)
    took = footprint(model, [experts], [needs], memory=64 * GIB).fixed
    assert took < 0.12 * 2 * weights


@pytest.mark.parametrize(
    ("available", "limit"), [(1, 1), (7.9, 2), (8, 4), (100, 4), (0.1, 1)]
)
def test_auto_on_a_cpu(
    available: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        pass

    memory = Memory()
    memory.available = int(available * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    model = tiny.make_model("llama")
    assert limit_by_machine(model, find_blocks(model).modules) == limit * GIB


@pytest.mark.parametrize(
    ("free", "unused", "limit"), [(79, 0, 32), (40, 0, 16), (20, 13, 16), (1, 0, 1)]
)
def test_auto_on_an_accelerator(
    free: int, unused: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_accelerator():
        for name, value in (
            ("get_memory_info", (free * GIB, 80 * GIB)),
            ("memory_reserved", 3 * GIB + unused * GIB),
            ("memory_allocated", 3 * GIB),
        ):
            monkeypatch.setattr(torch.accelerator, name, lambda *_, v=value: v)
        model = set_onload_device(tiny.make_model("llama"), torch.device("fake:0"))
        assert limit_by_machine(model, find_blocks(model).modules) == limit * GIB


def test_no_weight_is_onloaded_to_know_the_memory() -> None:
    with fake_accelerator() as device:
        model = set_onload_device(tiny.make_model("llama"), torch.device("fake:0"))
        blocks = find_blocks(model)
        device.log.clear()
        footprint(model, blocks.modules, [Needs(pruned=1, backward=True)], memory=GIB)
        assert not device.log["to device"]
