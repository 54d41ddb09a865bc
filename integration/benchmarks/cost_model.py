"""
What the allocation costs on large models, against the pruning itself.

    python integration/benchmarks/cost_model.py [--models 8B 70B] [--gpus 1 8] [--json]

Prints the tables of docs/scaling.md. The schedule is that of `allocate` itself, which
runs with its forwards left out; every forward is then traced on blocks of full shape
without memory (gpu_trace.py), and times follow from stated rates. Worked out, not
measured: read every time as good to a factor of 2.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from compressed_tensors.distributed import greedy_bin_packing
from gpu_trace import RATES, Cost, tracing
from imagined_ranks import imagined_ranks
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify
from loguru import logger
from transformers import LlamaConfig, LlamaForCausalLM

from absorb_plugin import method
from absorb_plugin.allocate import allocate
from absorb_plugin.allocators.base_allocation import base_allocation
from absorb_plugin.allocators.owl import Owl
from absorb_plugin.blocks import BlockMap, find_blocks
from absorb_plugin.calibration import JOINED, Batch
from absorb_plugin.distributed import row_share
from absorb_plugin.forward import memory
from absorb_plugin.forward.graphs import KeptGraphs
from absorb_plugin.forward.inputs import InputStatistics
from absorb_plugin.forward.memory import footprint
from absorb_plugin.forward.probe import Needs, Probe
from absorb_plugin.forward.resident import room
from absorb_plugin.forward.run import run_probes
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.judges import MaskedLoss, PrunedLoss
from absorb_plugin.pruners import PRUNERS, Pruner, sparsegpt, thresholds
from absorb_plugin.pruners.masks import MaskedWeights
from absorb_plugin.pruners.packed import Packed
from absorb_plugin.pruners.slopes import MaskedSlopes, PrunedSlopes, band
from absorb_plugin.pruners.thresholds import LEVELS
from absorb_plugin.search.budget import Budget
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.signals.gradient import GradientProbe, LinearSlopes
from absorb_plugin.signals.pruned_model import PrunedModel
from absorb_plugin.signals.pruner_gradient import PrunerGradient

GIB = 2**30
CONFIGS = {
    "8B": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "70B": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
FREE = 72 * GIB  # of an H100 with nothing but a block on it
S = 0.6


@dataclass(frozen=True)
class Station:
    """
    One kind of run of the method.

    :param runs: how often
    :param samples: of one run
    :param tokens: of a sample
    :param candidates: allocations that are judged at once
    :param pruning: samples that weights are pruned by, among `samples`
    :param in_parts: whether blocks may run fewer samples than a batch has at a time
    :param gpus: that share its samples and its work on weights
    """

    name: str
    probe: str
    needs: Needs
    runs: int
    samples: int
    tokens: int
    candidates: int = 0
    pruning: int = 0
    in_parts: bool = False
    gpus: int = 1

    @property
    def by_part(self) -> bool:
        return self.in_parts or self.needs.single_batch


class Recorder(ProbeRunner):
    """Notes what is to run, and answers something."""

    def __init__(self, *args: Any) -> None:
        self.cache, self.joins_rows = None, False
        self.stations: list[Station] = []
        Recorder.last = self

    def kept_onloaded(self) -> AbstractContextManager[None]:
        return nullcontext()

    def spare(self, needs: Needs, samples: Sequence[dict]) -> int:
        return 0

    def has_room(self, needs: Needs, samples: Sequence[dict]) -> bool:
        return True

    def run(
        self,
        what: str,
        samples: Sequence[dict],
        probe: Probe,
        *,
        in_parts: bool = False,
    ) -> Any:
        candidates = len(getattr(probe, "_candidates", ()))
        station = Station(
            what,
            type(probe).__name__,
            probe.needs,
            1,
            len(samples),
            max(sample["input_ids"].shape[1] for sample in samples),
            candidates,
            getattr(probe, "_calibrating", 0),
            in_parts,
        )
        self.stations.append(station)
        return _answer(probe, len(samples), candidates)


def _answer(probe: Probe, samples: int, candidates: int) -> Any:
    """Every candidate beats the one before, so that nothing is left out."""
    if isinstance(probe, InputStatistics):
        return {
            k: torch.ones(v.in_features) for k, v in probe._blocks.linears().items()
        }
    if isinstance(probe, GradientProbe):
        slopes = np.random.default_rng(0).normal(size=(samples, len(probe._rows)))
        return LinearSlopes(slopes, np.full(samples, 100.0), [], 3.0)
    if isinstance(probe, PrunedModel):
        flat = probe._allocation
        return PrunedSlopes(probe._blocks, {}, flat, flat, step=0.1)
    losses = 300.0 - 20 * np.arange(candidates)[:, None] * np.ones((1, samples))
    return losses, np.full(samples, 100.0)


def schedule(pruner: Pruner, widest: int, samples: int, tokens: int) -> list[Station]:
    """
    What `allocate` runs at its defaults where the outcome of its search wins, equal
    runs counted together. Where it loses, halfway is judged too, by one run more.
    """
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=tokens,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (samples, tokens), generator=generator)
    batches = [{"input_ids": row[None]} for row in ids]
    with (
        patch.object(method, "ProbeRunner", Recorder),
        patch.object(method, "widest", return_value=widest),
    ):
        allocate(
            model,
            find_blocks(model),
            batches,
            sparsity=S,
            pruner=pruner,
            # OWL often makes all blocks of so small a model equal, and equals are
            # judged once: a base apart from uniform, as OWL's is of real models
            settings=AllocationSettings(allocator="atp"),
        )
    found: dict[tuple, Station] = {}
    for station in Recorder.last.stations:
        key = (station.name, station.needs, station.samples, station.candidates)
        runs = found[key].runs + 1 if key in found else 1
        found[key] = replace(station, runs=runs)
    return list(found.values())


def build(name: str, layers: int) -> LlamaForCausalLM:
    fields = CONFIGS[name] | {"num_hidden_layers": layers}
    config = LlamaConfig(**fields, attn_implementation="eager")
    config.max_position_embeddings = 8192
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def make_probe(station: Station, blocks: BlockMap, pruner: Pruner) -> Probe:
    sums = {
        name: torch.ones(linear.in_features, device="meta")
        for name, linear in blocks.linears().items()
    }
    joined = station.gpus > 1
    # ranked by an earlier station
    quantiles = {
        name: torch.zeros(_rows(linear), LEVELS + 1)
        for name, linear in blocks.linears().items()
    }
    count = len(sums)
    # unequal, for equal sparsities would share their thresholds
    flats = [np.full(count, S + 0.01 * i) for i in range(station.candidates)]
    if station.probe == "InputStatistics":
        return InputStatistics(blocks)
    if station.probe == "PrunedModel":
        probe = PrunedModel(blocks, pruner, np.full(count, S), 0.1)
        probe.joined = joined
        return probe
    if station.probe == "GradientProbe" and station.needs.kept_weights:
        return GradientProbe(blocks, pruned_slopes(blocks, joined))
    masks = MaskedWeights(blocks, pruner.masks, sums, quantiles, joined)
    if station.probe == "GradientProbe":
        flat = np.full(count, S)
        return GradientProbe(blocks, MaskedSlopes(blocks, masks, flat, 0.05))
    if station.probe == "PrunedLoss":
        together = station.needs.sets > 1
        return PrunedLoss(blocks, pruner, flats, station.pruning, together)
    assert station.probe == "MaskedLoss", station.probe
    return MaskedLoss(blocks, masks, flats)


def _rows(linear: torch.nn.Linear) -> int:
    rows = row_share(linear.out_features)
    return rows.stop - rows.start


def pruned_slopes(blocks: BlockMap, joined: bool) -> PrunedSlopes:
    """Weights that the pruner has made, a step away from where they are wanted."""
    kept = {
        index: {
            name: [_packed(linear.weight[: _rows(linear)], 1 - S) for _ in range(3)]
            for name, linear in blocks.blocks[index].linears.items()
        }
        for index in blocks.prunable
    }
    count = len(blocks.linears())
    made, wanted = np.full(count, S), np.full(count, S + 0.02)
    return PrunedSlopes(blocks, kept, made, wanted, step=0.1, joined=joined)


def _packed(weight: torch.Tensor, left: float) -> Packed:
    """Of a share of the weights, without data."""
    bits = weight.new_empty(math.ceil(weight.numel() / 8), dtype=torch.uint8)
    values = weight.new_empty(round(weight.numel() * left))
    return Packed(bits, values.detach(), weight.shape)


def traced(
    name: str,
    layers: int,
    station: Station,
    pruner: Pruner,
    together: int,
    batches: int,
    rank: int = 0,
) -> Cost:
    """Of so many batches through a model of so many blocks, on one of the GPUs."""
    model = build(name, layers)
    blocks = find_blocks(model)
    with imagined_ranks(station.gpus, rank):
        probe = make_probe(station, blocks, pruner)
        probe.share([{}] * station.samples)  # tells it how many it is to prune by
    ids = torch.ones(together, station.tokens, dtype=torch.long, device="meta")
    data: list[Batch] = [{"input_ids": ids} for _ in range(batches)]
    own = dict(model.named_parameters()), dict(model.named_buffers())
    limit = station_limit(station) if station.by_part else None
    with (
        # a limit may have room for some blocks' graphs, and then these do not run again
        patch.object(KeptGraphs, "may_keep", lambda *_: False),
        imagined_ranks(station.gpus, rank) as ranks,
        tracing(*own) as cost,
        columns_once(cost),
        picked_by_sample(),
    ):
        run_probes(
            model,
            blocks,
            data,
            [probe],
            memory=limit,
            in_parts=station.in_parts,
            joined=probe.own_weights and station.gpus > 1,
        )
    cost.seconds["links"] = sum(ranks.received.values()) / RATES.link
    return cost


@contextmanager
def columns_once(cost: Cost) -> Iterator[None]:
    """
    Within the context the columns that SparseGPT walks through one by one, ours and
    llm-compressor's, are traced once for each shape: the others cost the same.
    """
    original, known = sparsegpt._prune_columns, {}

    def prune(
        part: torch.Tensor, mask: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        if part.shape in known:
            cost.add(known[part.shape])
            return torch.empty_like(part)
        before = cost.copy()
        errors = original(part, mask, inverse)
        known[part.shape] = cost.plus(before, -1)
        return errors

    def columns(*bounds: int) -> Iterable[int]:
        if len(bounds) > 1:  # the outer loop, over groups of columns
            return range(*bounds)
        if bounds in known:
            cost.add(known[bounds])
            return ()
        return first(bounds)

    def first(bounds: tuple[int, ...]) -> Iterator[int]:
        before = cost.copy()
        yield from range(*bounds)
        known[bounds] = cost.plus(before, -1)

    with (
        patch.object(sparsegpt, "_prune_columns", prune),
        patch.object(sgpt_sparsify, "range", columns, create=True),
    ):
        yield


@contextmanager
def picked_by_sample() -> Iterator[None]:
    """
    Within the context as many scores are picked out of a whole tensor as a sample of
    it leaves; without data there is no telling.
    """
    original = thresholds._near

    def near(scores: torch.Tensor, rank: int) -> tuple[torch.Tensor, int]:
        picked, _ = original(scores, rank)
        share = 2 * thresholds.MARGIN / thresholds.SAMPLE
        return picked[: round(len(scores) * share)], 0

    with patch.object(thresholds, "_near", near):
        yield


def memory_limit() -> int:
    """`probe_memory: auto` on a card with nothing but a block on it."""
    return memory._power_of_two(FREE * memory.SHARE, memory.MOST)


def station_limit(station: Station) -> int:
    """Half of it for all but the statistics, since blocks stay on the card."""
    whole = station.probe == "InputStatistics"
    return memory_limit() if whole else memory_limit() // 2


def kept_share(name: str, gpus: int) -> float:
    """
    Of the blocks, or of this rank's rows of them, that stay on the card once they are
    onloaded.
    """
    size = shape(name)
    left = room(FREE, memory_limit() // 2, 2 * size["block"], 2 * 2 * size["head"])
    return min(1.0, left // (2 * size["block"] / gpus) / size["layers"])


def copied_share(name: str, gpus: int) -> float:
    """Of what the pruner has made, that stays beside them (`resident.spare`)."""
    size, kept = shape(name), kept_share(name, gpus)
    own = size["block"] * size["layers"] / gpus
    # of a model that does not stay as a whole nothing is left
    free = FREE - round(kept * 2 * own)
    left = room(free, memory_limit() // 2, 2 * size["block"], 2 * 2 * size["head"])
    made = own * sum(packed_bytes())
    return min(1.0, left / made) if kept == 1.0 else 0.0


def packed_bytes() -> list[float]:
    """Per weight of each copy that is made: a bit, and the share that is left."""
    sparsities = (S, *band(S, PrunerGradient().step))
    return [1 / 8 + 2 * (1 - sparsity) for sparsity in sparsities]


def station_cost(
    name: str, station: Station, pruner: Pruner, gpus: int, stay: bool
) -> dict[str, Any]:
    """
    Of all runs of a station on one of the GPUs.

    :param stay: whether blocks stay on the device, as they do until a probe passes its
        limit by itself
    """
    model = build(name, CONFIGS[name]["num_hidden_layers"])
    blocks = find_blocks(model)
    limit = station_limit(station)
    station = replace(station, gpus=gpus)
    with imagined_ranks(gpus):
        needs = make_probe(station, blocks, pruner).needs
        need = footprint(model, blocks.modules, [needs], limit)
        most = need.whole(station.samples, station.tokens)
        if station.needs.sets > 1 and most > limit:  # `ProbeRunner.has_room`
            station = replace(station, needs=replace(station.needs, sets=1))
            needs = make_probe(station, blocks, pruner).needs
            need = footprint(model, blocks.modules, [needs], limit)
    stay = stay and need.fixed <= limit
    whole = station.needs.single_batch
    judged = station.samples - station.pruning
    mine = math.ceil(station.pruning / gpus) + math.ceil(judged / gpus)
    fits = need.kept_samples if station.in_parts else need.samples
    together = mine if whole else min(JOINED, mine, fits(station.tokens, limit))
    batches = math.ceil(mine / together)
    together = math.ceil(mine / batches)
    part = together
    if station.by_part:
        part = need.part(together, station.tokens, limit)
    cost = _extrapolated(name, station, pruner, together, batches)
    moved = _moved(name, station, batches, stay, gpus)
    took = need.whole(together, station.tokens, part)
    return {
        "station": station.name,
        "runs": station.runs,
        "samples": mine,
        "tokens": station.tokens,
        "batches": batches,
        "moved": station.runs * moved,
        "bus seconds": _bus_seconds(station.name, station.runs * moved, gpus),
        "statement": took,
        "stay": stay,
        **_scaled(cost, station.runs),
    }


@cache
def _extrapolated(
    name: str, station: Station, pruner: Pruner, together: int, batches: int
) -> Cost:
    """
    Linear in blocks, and in batches after the first, which ranks the weights. Where
    ranks prune, on the one that has most to do: the others wait for it.
    """

    def along(batches: int, rank: int = 0) -> Cost:
        found = {
            n: traced(name, n, station, pruner, together, batches, rank) for n in (1, 2)
        }
        return _along(found, CONFIGS[name]["num_hidden_layers"])

    if station.needs.single_batch:
        of_ranks = [along(batches, rank) for rank in range(station.gpus)]
        return max(of_ranks, key=lambda cost: cost.total)
    total = along(1)
    if batches > 1:
        total = total.plus(along(2).plus(total, -1), batches - 1)
    return total


def _along(found: dict[int, Cost], layers: int) -> Cost:
    return found[1].plus(found[2].plus(found[1], -1), layers - 1)


def _moved(name: str, station: Station, batches: int, stay: bool, gpus: int) -> int:
    """Bytes over the bus where the model is offloaded: blocks, embedding, head."""
    size = shape(name)
    weights, heads = size["layers"] * size["block"], 3 * size["head"]
    # a rank's rows
    visits = (2.0 if station.needs.backward else 1.0) / gpus
    if station.probe == "InputStatistics":  # which comes first
        heads = 2 * size["head"]
    elif stay and (kept := kept_share(name, gpus)):
        visits, heads = visits * (1 - kept), 0  # they stay with the first block
    copies = 0.0
    if station.needs.kept_weights:
        own, less, more = packed_bytes()
        # forward two of three, backward all; or all of them, once they are made
        copies = own + less + more
        if station.needs.backward:
            visits, copies = 0.0, copies + own + (less + more) / 2
        copies *= (1 - copied_share(name, gpus)) / gpus
    if station.needs.single_batch and gpus > 1:  # what it prunes comes as a whole
        visits += size["most"]
    return round(batches * (2 * (visits * weights + heads) + copies * weights))


def _bus_seconds(station: str, moved: int, gpus: int) -> float:
    """
    Once the statistics are there, weights come through page-locked memory, but not
    where each rank has one thread, as torchrun gives them.
    """
    pageable = station == "Input statistics" or gpus > 1
    return moved / (RATES.bus if pageable else RATES.locked)


@cache
def shape(name: str) -> dict[str, Any]:
    model = build(name, 1)
    linears = find_blocks(model).linears().values()
    return {
        "layers": CONFIGS[name]["num_hidden_layers"],
        "block": sum(x.in_features * x.out_features for x in linears),
        "head": model.lm_head.in_features * model.lm_head.out_features,
        "widest": max(x.in_features for x in linears),
        # of a block's weights, the share of the largest Linear
        "most": max(x.weight.numel() for x in linears)
        / sum(x.weight.numel() for x in linears),
    }


def allocator_cost(name: str, gpus: int) -> dict[str, Any]:
    """OWL, which reads every weight twice, each rank those of its blocks."""
    costs = {}
    for layers in (1, 2):
        model = build(name, layers)
        blocks = find_blocks(model)
        sums = {
            k: torch.ones(v.in_features, device="meta")
            for k, v in blocks.linears().items()
        }
        sizes = np.array([x.weight.numel() for x in blocks.linears().values()])
        with tracing(dict(model.named_parameters())) as costs[layers]:
            base_allocation(Owl(), blocks, sums, Budget.of(sizes, S, 0.95))
    size = shape(name)
    # the first read brings in what stays
    reads = 2 - kept_share(name, gpus) if gpus == 1 else 2
    moved = round(2 * reads * size["layers"] * size["block"] / gpus)
    return {
        "station": "OWL",
        "runs": 1,
        "samples": 0,
        "tokens": 0,
        "batches": 0,
        "moved": moved,
        "bus seconds": _bus_seconds("OWL", moved, gpus),
        "statement": 0,
        **_scaled(_along(costs, size["layers"]), 1 / gpus),
    }


def ranking_cost(name: str, pruner: Pruner, gpus: int) -> dict[str, Any]:
    """
    Of all weights, once, while a station has them on the device; each rank its rows.
    """
    (block,) = build(name, 1).model.layers
    linears = [x for x in block.modules() if isinstance(x, torch.nn.Linear)]
    with tracing(dict(block.named_parameters())) as cost, torch.no_grad():
        for linear in linears:
            observed = torch.ones(linear.in_features, device="meta")
            pruner.masks.quantiles(linear.weight, observed)
    return {
        "station": "ranking",
        "runs": 1,
        "samples": 0,
        "tokens": 0,
        "batches": 0,
        "moved": 0,
        "bus seconds": 0.0,
        "statement": 0,
        **_scaled(cost, shape(name)["layers"] / gpus),
    }


def pruner_cost(
    name: str, pruner: str, gpus: int, samples: int, tokens: int
) -> dict[str, Any]:
    """
    llm-compressor's own work: two passes of all samples, observing, pruning. Of several
    ranks each takes its samples and its Linears, as `pruners.ranks` shares them out.
    """
    model = build(name, 1)
    (block,) = model.model.layers
    with tracing(dict(model.named_parameters())) as forward:
        ids = torch.ones(1, tokens, dtype=torch.long, device="meta")
        with torch.no_grad():
            model.model(input_ids=ids)
    observe, pruning, link = Cost(), [], 0.0
    modules = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    for module in modules:
        x = torch.ones(1, tokens, module.in_features, device="meta").bfloat16()
        with (
            tracing(dict(module.named_parameters()), {"x": x}) as cost,
            torch.no_grad(),
        ):
            if pruner == "sparsegpt":
                seen, _ = sgpt_sparsify.accumulate_hessian(
                    x, module, sgpt_sparsify.make_empty_hessian(module), 0
                )
            else:
                seen, _ = wanda_sparsify.accumulate_row_scalars(
                    x, module, wanda_sparsify.make_empty_row_scalars(module), 0
                )
        observe = observe.plus(cost)
        with (
            tracing(dict(module.named_parameters())) as cost,
            columns_once(cost),
            torch.no_grad(),
        ):
            _prune(pruner, module, seen)
        pruning.append((seen.numel(), cost))
        link += seen.nbytes + module.weight.nbytes
    size = shape(name)
    each = forward.plus(forward).plus(observe)
    prune = _longest(pruning, gpus)
    if gpus > 1:
        prune.seconds["links"] = link / RATES.link
    total = Cost().plus(prune.plus(each, math.ceil(samples / gpus)), size["layers"])
    moved = 2 * 2 * size["layers"] * size["block"]
    return {
        "station": f"{pruner} itself",
        "runs": 1,
        "samples": samples,
        "tokens": tokens,
        "batches": samples,
        "moved": moved,
        "bus seconds": moved / RATES.bus,
        "statement": 0,
        **_scaled(total, 1),
    }


def _longest(pruning: list[tuple[int, Cost]], gpus: int) -> Cost:
    """
    Of the rank with the most to prune.

    :param pruning: of every Linear the size of its statistics, and its cost
    """
    _, _, owners = greedy_bin_packing(
        list(range(len(pruning))), gpus, lambda i: pruning[i][0]
    )
    shares = [
        reduce(Cost.plus, (pruning[i][1] for i, own in owners.items() if own == one))
        for one in set(owners.values())
    ]
    return max(shares, key=lambda cost: cost.total)


def _prune(pruner: str, module: torch.nn.Linear, seen: torch.Tensor) -> None:
    if pruner == "wanda":
        wanda_sparsify.sparsify_weight(module, {module: seen}, S, 0, 0)
    else:
        sgpt_sparsify.sparsify_weight(module, {module: seen}, S, 0, 0, 128, 0.01, False)


def _scaled(cost: Cost, times: float) -> dict[str, Any]:
    return {
        "seconds": {k: v * times for k, v in cost.seconds.items()},
        "count": {k: v * times for k, v in cost.count.items()},
        "peak": cost.peak,
    }


def model_rows(
    name: str, pruner: str, gpus: int, samples: int, tokens: int
) -> list[dict[str, Any]]:
    kind = PRUNERS[pruner]()
    stations = schedule(kind, shape(name)["widest"], samples, tokens)
    rows: list[dict[str, Any]] = []
    for station in stations:
        stay = all(row["stay"] for row in rows[1:])  # statistics come before them
        rows.append(station_cost(name, station, kind, gpus, stay))
    rows[1:1] = [allocator_cost(name, gpus), ranking_cost(name, kind, gpus)]
    for row in rows:
        row |= {"model": name, "pruner": pruner, "gpus": gpus}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=CONFIGS)
    parser.add_argument("--pruners", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--samples", type=int, default=512, help="of calibration")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logger.remove()  # llm-compressor's would stand among the tables
    logger.add(sys.stderr, level="WARNING", format="{message}")
    result = []
    for name in options.models:
        for pruner in options.pruners:
            for gpus in options.gpus:
                what = (name, pruner, gpus, options.samples, options.seq_len)
                rows, itself = model_rows(*what), pruner_cost(*what)
                result.append({"rows": rows, "itself": itself, "gpus": gpus})
    print(json.dumps(result, indent=1) if options.json else tables(result))


def tables(result: list[dict[str, Any]]) -> str:
    return "\n\n".join(_table(**part) for part in result)


def _table(rows: list[dict[str, Any]], itself: dict[str, Any], gpus: int) -> str:
    first = rows[0]
    pruning = _seconds(itself)
    lines = [
        f"{first['model']}, {first['pruner']}, {gpus} GPU{'s' * (gpus > 1)}:",
        "",
        "| station | runs | samples a GPU | batches | resident, s | onloads, s "
        "| products, factors, traffic, sorts, launches, links, s | GiB live "
        "| GiB stated |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = row["seconds"]
        sorts = parts.get("sorts", 0) + parts.get("selections", 0)
        split = [
            *(parts.get(key, 0) for key in ("products", "factors", "traffic")),
            sorts,
            *(parts.get(key, 0) for key in ("launches", "links")),
        ]
        lines.append(
            f"| {row['station']} | {row['runs']} | {row['samples']} × {row['tokens']} "
            f"| {row['batches']} | {sum(parts.values()):.1f} "
            f"| {row['bus seconds']:.1f} | {', '.join(f'{x:.1f}' for x in split)} "
            f"| {row['peak'] / GIB:.1f} | {row['statement'] / GIB:.1f} |"
        )
    whole = sum(map(_seconds, rows))
    resident = sum(sum(row["seconds"].values()) for row in rows)
    lines.append("")
    lines.append(
        f"Allocation {whole:.0f} s offloaded, {resident:.0f} s resident; "
        f"{first['pruner']} itself, {itself['samples']} × {itself['tokens']} tokens: "
        f"{pruning:.0f} s; share {whole / pruning:.0%} offloaded"
    )
    return "\n".join(lines)


def _seconds(row: dict[str, Any]) -> float:
    """Weights come one after the other with the work: nothing overlaps."""
    return sum(row["seconds"].values()) + row["bus seconds"]


if __name__ == "__main__":
    main()
