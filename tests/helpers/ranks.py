"""
What test_distributed.py compares: the same work on one, two and three ranks.

Run as a script, with a folder as its argument: it forks the ranks, so that one import
of llm-compressor serves all of them, and each writes what it found.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from compressed_tensors.offload import set_onload_device
from compressed_tensors.offload.convert import from_accelerate
from llmcompressor.core import reset_session
from safetensors.torch import load_file
from torch import distributed
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from absorb_plugin._llmcompressor import linearize_moe
from absorb_plugin.allocators import owl
from absorb_plugin.blocks import find_blocks
from absorb_plugin.calibration import pad_to_batch, read_batches
from absorb_plugin.forward import joined, runner
from absorb_plugin.forward.joined import joined_before_made
from absorb_plugin.hookspecs import hookimpl
from absorb_plugin.judges import PrunedLoss
from absorb_plugin.plugins import manager
from absorb_plugin.pruners import experts, factor, sparsegpt, together
from absorb_plugin.signals.gradient import GradientProbe
from absorb_plugin.signals.pruned_model import PrunedModel
from helpers import runs, tiny
from helpers.fake_accelerator import fake_accelerator
from helpers.strict_collectives import CARD, strict_collectives

WORLDS = (1, 2, 3)
Batches = list[dict[str, torch.Tensor]]

# name -> fields of the modifier, and "kind" of the pruner, "seed" of the model
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "gradient": {"signal": "gradient"},
    "response": {"signal": "response"},
    # a rank has no sample, or more batches of unequal length than another
    "response to one": {"signal": "response", "signal_samples": 1},
    "noise": {"signal": "noise", "signal_args": {"samples": 7}, "strength": 0.1},
    "auto": {
        "allocator": "uniform",
        "strength": "auto",
        "rounds": 2,
        "report_dir": "for the noise probe",
        # with these a step is taken
        "probe_tokens": 8,
        "seed": 15,
    },
    "confirmed": {
        "allocator": "uniform",
        "strength": "auto",
        "rounds": 2,
        "probe_tokens": 8,
        "seed": 15,
        "kind": "sparsegpt",
    },
    "pruner": {"signal": "pruner", "kind": "sparsegpt", "level": "part"},
    # what all ranks factor, at more sparsities than there are ranks, and fewer
    "wide": {
        "allocator": "uniform",
        "signal": "pruner",
        "strength": "auto",
        "rounds": 2,
        "seed": 15,
        "kind": "sparsegpt",
        "wide": True,
    },
    "columns first": {"signal": "pruner", "kind": "sparsegpt", "turned": True},
    "alpha": {"allocator": "alpha_pruning", "granularity": "linear"},
    "offloaded": {"kind": "sparsegpt", "probe_tokens": 8, "offload": True},
    "lsa": {"allocator": "lsa", "granularity": "linear"},
    # more ranks than samples of any kind
    "few": {
        "kind": "sparsegpt",
        "signal_samples": 1,
        "search_samples": 1,
        "confirm_samples": 2,
        "statistics_samples": 1,
        "probe_tokens": 16,
    },
    "experts": {"architecture": "qwen3_moe", "statistics_samples": 3},
    # a bound on the loss, with one scale for all inputs of a Linear on all ranks
    "bounded": {
        "allocator": "uniform",
        "strength": "auto",
        "rounds": 2,
        "probe_tokens": 8,
        "seed": 15,
        "max_loss_increase": 9.0,
        "scheme": "FP8",
    },
}
# tried where each rank has a card of its own, and whether the model lies on it
ON_CARDS = {
    "gradient": "there",
    "pruner": "away",
    "confirmed": "there",
    "wide": "there",
}
# how the samples are shared out: number of ranks -> bounds of contiguous shards
SHARDS: dict[str, dict[int, tuple[int, ...]]] = {
    "unequal": {1: (0, 13), 2: (0, 10, 13), 3: (0, 3, 4, 13)},
    "one empty": {1: (0, 13), 2: (0, 0, 13), 3: (0, 5, 5, 13)},
}
# tried with "auto" on several ranks; beside SHARDS every n-th sample, or the first ones
SCHEMES = ["unequal", "one empty", "dealt", "copied"]
# name -> pruner, whether its statistics are reduced
PRUNINGS = {
    f"{kind}, {'reduced' if reduced else 'as they are'}": (kind, reduced)
    for kind in runs.PRUNERS
    for reduced in (True, False)
}
WIDE = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192}


class Observer:
    """What the hook of outsiders is told."""

    def __init__(self) -> None:
        self.calls = 0

    @hookimpl
    def allocation_finished(self, profile: dict[str, Any]) -> None:
        self.calls += 1


def samples() -> Batches:
    """13 samples of 9 to 16 tokens, in no order of length."""
    lengths = [16, 12, 16, 9, 14, 16, 16, 11, 16, 10, 16, 13, 16]
    return [
        tiny.make_batch(1, length, seed=seed) for seed, length in enumerate(lengths)
    ]


def shard(scheme: str, world: int, rank: int) -> Batches:
    """This rank's samples; "dealt" gives every n-th, last first, two in a batch."""
    every = samples()
    if scheme == "copied":  # as llm-compressor's own sharding does
        return every[: 13 - rank]
    if scheme in SHARDS:
        start, stop = SHARDS[scheme][world][rank : rank + 2]
        return every[start:stop]
    mine = every[rank::world][::-1]
    return [pad_to_batch(mine[i : i + 2]) for i in range(0, len(mine), 2)]


def allocate(
    fields: dict[str, Any], loader: Sequence[Any], card: str = ""
) -> dict[str, Any]:
    """:param card: where the model is, "there" on one or "away" from it"""
    fields = dict(fields)
    model = tiny.make_model(
        fields.pop("architecture", "llama"), seed=fields.pop("seed", 0)
    )
    kind = fields.pop("kind", "wanda")
    if fields.pop("turned", False):  # weights that are no rows in memory
        for linear in find_blocks(model).linears().values():
            linear.weight.data = linear.weight.data.t().contiguous().t()
    if card == "there":
        model = model.to(CARD)
    elif card == "away":
        model = set_onload_device(model, CARD)
    with ExitStack() as stack:
        factored = stack.enter_context(counted(sparsegpt, "factored_together"))
        if fields.pop("wide", False):
            stack.enter_context(patch.object(together, "WIDE", 1))
            stack.enter_context(patch.object(factor, "PANEL", 5))
        if fields.pop("offload", False) and distributed.is_initialized():
            model = offload_to_host(model)
            # as on an accelerator, where they are not on the device
            away = patch.object(runner, "is_offloaded", lambda module: True)
            stack.enter_context(away)
        fields = {"signal_samples": 5, "search_samples": 4} | fields
        if "scheme" in fields:
            quantizer = runs.quantizer(fields.pop("scheme"))
            fields["quantized"] = runs.given_schemes(model, quantizer)
        found = runs.allocate(model, read_batches(loader), 0.6, kind, **fields)
    noise, search, confirmed = found.noise, found.search, found.confirmed
    return {
        "costs": None
        if found.quality is None
        else [x.increase for x in (found.quality.quantization, found.quality.found)],
        "targets": list(found.linear_sparsities().values()),
        "direction": None if found.direction is None else found.direction.tolist(),
        "noise": None
        if noise is None
        else [*noise.ratio, *noise.ratio_error, noise.samples, noise.tokens],
        "losses": None if search is None else list(search.judged.values()),
        "steps": None if search is None else search.taken,
        "confirmed": None if confirmed is None else list(confirmed.losses.values()),
        "taken": None if confirmed is None else confirmed.chosen,
        "factored": factored.call_count,
    }


def counted(place: Any, name: str) -> Any:
    """Within the context calls of a function are counted."""
    return patch.object(place, name, MagicMock(wraps=getattr(place, name)))


def allocations(world: int, rank: int) -> dict[str, Any]:
    found = {}
    for name, fields in ALLOCATIONS.items():
        for scheme in SCHEMES if name == "auto" and world > 1 else ["unequal"]:
            found[f"{name}, {scheme}"] = allocate(fields, shard(scheme, world, rank))
    return found


def on_cards(world: int, rank: int) -> dict[str, Any]:
    """By collectives as strict as NCCL's, and how many tensors went over them."""
    mine = shard("unequal", world, rank)
    found = {}
    for name, where in ON_CARDS.items():
        with strict_collectives() as strict, tried_soon():
            found[name] = allocate(ALLOCATIONS[name], mine, where)
        found[name]["exchanged"] = strict.tensors
    return found


def kept(world: int, rank: int, folder: Path) -> list[dict[str, Any]]:
    """An allocation that fills a profile_cache, and one that must not run the model."""
    fields = {**ALLOCATIONS["auto"], "profile_cache": folder / f"kept{world}"}
    first = allocate(fields, shard("unequal", world, rank))
    measure, runner.run_probes = runner.run_probes, None
    second = allocate(fields, shard("unequal", world, rank))
    runner.run_probes = measure
    return [first, second]


def in_step(world: int, rank: int, folder: Path) -> dict[str, Any]:
    """Allocations on whose way one rank is in trouble, and what it says of failures."""
    mine, last = shard("unequal", world, rank), rank == world - 1
    found: dict[str, Any] = {}
    pruner, confirmed = ALLOCATIONS["pruner"], ALLOCATIONS["confirmed"]
    for name, (probe, step, fields) in {
        "no room for slopes": (GradientProbe, "_backward", ALLOCATIONS["gradient"]),
        "no room for pruned slopes": (GradientProbe, "enter", pruner),
        "no room to judge": (PrunedLoss, "leave", confirmed),
        "no room to prune": (PrunedModel, "leave", pruner),
    }.items():
        error = torch.OutOfMemoryError("it is full")
        with fails_once(probe, step, error if last else None):
            found[name] = allocate(fields, mine)
    for name, probe in {"slopes": GradientProbe, "judge": PrunedLoss}.items():
        with fails_once(probe, "leave", ValueError("no way") if last else None):
            found[name] = _error(lambda: allocate(confirmed, mine))

    # a placeholder waits behind batches that are halved
    wide = {"signal": "gradient", "signal_samples": 16}
    even = [tiny.make_batch(1, 16, seed=seed) for seed in range(20)][rank::world]
    found["no room, even"] = [allocate(wide, even)["targets"]]
    error = torch.OutOfMemoryError("it is full")
    with fails_once(GradientProbe, "_backward", error if last else None):
        found["no room, even"].append(allocate(wide, even)["targets"])
    # of several candidates one rank has room for all
    room = patch.object(runner.ProbeRunner, "has_room", lambda *_: not rank)
    with room:
        found["no room for all"] = allocate(confirmed, mine)

    # what a rank keeps is of the others' samples too
    cache = folder / f"changed{world}-{rank}"
    for name in ("lsa", "confirmed"):
        fields = {**ALLOCATIONS[name], "profile_cache": cache}
        first = allocate(fields, mine)
        other = mine if last else [*mine[1:], tiny.make_batch(1, 16, seed=99)]
        allocate(fields, other)
        found[f"{name}, changed"] = [first, allocate(fields, mine)]

    fields = {**pruner, "profile_cache": folder / f"own{world}-{rank}"}
    first = allocate(fields, mine)
    if last:
        shutil.rmtree(fields["profile_cache"])
    found["kept by some"] = [first, allocate(fields, mine)]
    found["joined"] = [joined_where_one_is_full(None), joined_where_one_is_full(last)]
    return found


def joined_where_one_is_full(full: bool | None) -> list[Any]:
    """
    Whether rows are joined, and that the ranks meet again after that was tried.

    :param full: whether this rank has no room to try it; None if all have
    """
    from absorb_plugin import distributed as ranks  # not torch's

    error = torch.OutOfMemoryError("it is full") if full else None
    with fake_accelerator(), tried_soon(), ranks.fail_together():
        if full is None:
            found = joined_before_made(torch.device("fake:0"), torch.float32)
        else:
            with fails_once(ranks, "join_rows", error):
                found = joined_before_made(torch.device("fake:0"), torch.float32)
        return [found, ranks.meet("here")]


@contextmanager
def tried_soon() -> Iterator[None]:
    """Within the context rows of small matrices are joined to try it, and are so."""
    with (
        patch.object(joined, "TRIED", 64),
        patch.object(joined, "_seconds", lambda run, device: run() or 1.0),
    ):
        yield


@contextmanager
def fails_once(kind: Any, name: str, error: Exception | None) -> Iterator[None]:
    """Within the context a method fails where it is called the second time."""
    original, calls = getattr(kind, name), iter([None, error])

    def method(*args: Any, **kwargs: Any) -> Any:
        if (trouble := next(calls, None)) is not None:
            raise trouble
        return original(*args, **kwargs)

    with patch.object(kind, name, method):
        yield


def failures(world: int, rank: int, folder: Path) -> dict[str, str]:
    """What every rank says when one of them fails."""
    poisoned = shard("unequal", world, rank)
    if rank == world - 1:
        poisoned[-1] = {"text": ["no tokens"]}
    found = {"no input_ids": _error(lambda: read_batches(poisoned))}
    found["no data"] = _error(lambda: read_batches([]))
    loader = None if rank == world - 1 else samples()
    found["no loader"] = _error(lambda: read_batches(loader))

    model = tiny.make_model("llama")
    model.get_input_embeddings().weight.data[1] = torch.inf
    batches = samples()[:2]
    # no other sample has this token; the shortest one every rank tries
    batches[0]["input_ids"][:] = 1
    found["infinity"] = _error(lambda: runs.allocate(model, batches, 0.6))
    # in an allocator, and in what the ranks share of its work
    model, mine = tiny.make_model("llama"), read_batches(samples()[rank::world])
    for case, (place, name) in {
        "allocator": (owl.Owl, "allocate"),
        "metric": (owl, "_outlier_percent"),
        "metric in other words": (owl, "_outlier_percent"),
    }.items():
        with ExitStack() as stack:
            if rank == world - 1:
                stack.enter_context(patch.object(place, name, _no_metric))
            if case.endswith("words"):
                own = _in_other_words(owl.of_all)
                stack.enter_context(patch.object(owl, "of_all", own))
            found[case] = _error(lambda: runs.allocate(model, mine, 0.6))
    with ExitStack() as stack:
        if rank == world - 1:
            stack.enter_context(patch.object(owl.Owl, "allocate", _no_metric))
        try:
            runs.allocate(model, mine, 0.6)
        except Exception:  # who tries again fails together again
            found["tried again"] = _error(lambda: runs.allocate(model, mine, 0.6))
    unlike = samples()[rank:]
    found["not alike"] = _error(lambda: runs.allocate(model, unlike, 0.6))

    own = folder / f"directories{rank}"
    own.mkdir(exist_ok=True)
    if rank == min(1, world - 1):
        (own / "report").write_text("a file is where the directory should be")
    recipe = [runs.absorption(report_dir=own / "report"), runs.pruner()]
    model = tiny.make_model("llama")
    found["no directory"] = _error(lambda: runs.run(model, recipe, own))
    reset_session()
    return found


def _no_metric(*_: Any, **__: Any) -> Any:
    raise ValueError("no metric")


def _in_other_words(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        try:
            return call(*args)
        except Exception:
            raise KeyError("no outliers")  # noqa: B904

    return called


def _error(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def prunings(world: int, rank: int, folder: Path) -> dict[str, Any]:
    """Weights after `oneshot`."""
    found: dict[str, Any] = {}
    start, stop = {1: (0, 8), 2: (0, 5, 8), 3: (0, 3, 5, 8)}[world][rank : rank + 2]
    common: dict[str, Any] = {
        "dataset": tiny.make_dataset(8).select(range(start, stop))
    }
    for name, (kind, reduced) in PRUNINGS.items():
        if world == 2 or (world == 1 and reduced):
            fields = common | {"reduce_pruner_statistics": reduced}
            found[name] = prune(kind, folder, rank, **fields)
    if world == 2:
        found["offloaded"] = prune("sparsegpt", folder, rank, offload=True, **common)
        return found
    # Only the basic pipeline stands a rank without samples.
    loader = DataLoader(shard("one empty", world, rank), collate_fn=lambda x: x[0])
    fields = {"dataset": loader, "pipeline": "basic"}
    found["one empty"] = prune("wanda", folder, rank, **fields)
    return found


def prune(
    kind: str,
    folder: Path,
    rank: int,
    offload: bool = False,
    reduce_pruner_statistics: bool = True,
    **fields: Any,
) -> dict[str, Any]:
    model = tiny.make_model("llama", **WIDE)
    directory = folder / f"rank{rank}"
    ours = runs.absorption(
        report_dir=directory / "report",
        reduce_pruner_statistics=reduce_pruner_statistics,
    )
    if offload:
        model = offload_to_host(model)
    pruner = runs.pruner(kind)
    observer = Observer()
    manager().register(observer)
    try:
        runs.run(model, [ours, pruner], directory, samples=13, **fields)
    finally:
        manager().unregister(observer)
        reset_session()
    assert "compress_modules" not in pruner.__dict__
    return {
        "weights": {
            name: linear.weight.detach().clone()
            for name, linear in find_blocks(model).linears().items()
        },
        "targets": pruner.sparsity,
        "reports": sorted(path.name for path in directory.glob("report/*")),
        "hooks": observer.calls,
    }


def offload_to_host(model: PreTrainedModel) -> PreTrainedModel:
    """As load_offloaded_model does, which wants an accelerator."""
    model = model.to("meta") if distributed.get_rank() else model
    from_accelerate(model)
    return model


def packed(rank: int, folder: Path) -> list[str]:
    """Tensors that are saved otherwise than the model has them."""
    model = tiny.gpt_oss()
    dense = tiny.snapshot(model)
    linearize_moe(model)
    experts.name_as_stored(model)
    turn = experts._in_turn

    def later(*args: Any) -> torch.Tensor:
        time.sleep(0.3 * rank)  # and another rank might have written by then
        return turn(*args)

    with patch.object(experts, "_in_turn", later):
        model.save_pretrained(folder / "packed")
    distributed.barrier()
    saved = load_file(folder / "packed" / "model.safetensors")
    return [name for name, own in dense.items() if not torch.equal(own, saved[name])]


def run_rank(rank: int, world: int, folder: Path) -> None:
    if world > 1:
        store = f"file://{folder}/store{world}"
        distributed.init_process_group("gloo", store, rank=rank, world_size=world)
    found: dict[str, Any] = {"allocations": allocations(world, rank)}
    found["kept"] = kept(world, rank, folder)
    if world > 1:
        found["failures"] = failures(world, rank, folder)
        found["in step"] = in_step(world, rank, folder)
    if world == 2:
        found["on cards"] = on_cards(world, rank)
        found["packed"] = packed(rank, folder)
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))
    torch.save(prunings(world, rank, folder), folder / f"{world}-{rank}.pt")
    if world > 1:
        distributed.destroy_process_group()


def ranks_of(world: int) -> Iterator[str]:
    return (f"{world}-{rank}" for rank in range(world))


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for world in WORLDS:
        torch.multiprocessing.start_processes(
            run_rank, (world, Path(sys.argv[1])), nprocs=world, start_method="fork"
        )
