"""
All probes, signals, judges and pruners of the package: the contract tests run over
these lists, so that none is left out. Another probe is a line in PROBES.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from absorb_plugin.allocators import Lsa
from absorb_plugin.allocators.grams import GramProbe
from absorb_plugin.blocks import BlockMap, find_blocks
from absorb_plugin.calibration import Batch
from absorb_plugin.forward.check import _ChainCheck, _LinearCalls, _PartCheck
from absorb_plugin.forward.inputs import InputStatistics
from absorb_plugin.forward.probe import Probe
from absorb_plugin.forward.run import run_probes
from absorb_plugin.groups import Groups
from absorb_plugin.judges import MaskedLoss, PrunedLoss
from absorb_plugin.pruners import PRUNERS, Pruner
from absorb_plugin.pruners.masks import MaskedWeights
from absorb_plugin.pruners.packed import unpacked
from absorb_plugin.pruners.slopes import MaskedSlopes, PrunedSlopes
from absorb_plugin.signals import SIGNALS
from absorb_plugin.signals.gradient import GradientProbe, LinearSlopes
from absorb_plugin.signals.noise import NoiseProbe, NoiseProfile
from absorb_plugin.signals.pruned_model import PrunedModel
from absorb_plugin.signals.response import Response, ResponseProbe
from helpers import naive

__all__ = [
    "JUDGES",
    "PROBES",
    "PRUNERS",
    "SIGNALS",
    "STEP",
    "Place",
    "ProbeCase",
    "by_block",
    "first_linears",
    "make_judge",
    "numbers",
    "place",
    "run",
]

JUDGES: dict[str, type[Probe]] = {"masks": MaskedLoss, "pruner": PrunedLoss}
STEP = 0.1
# Of a batch, what a judge that prunes goes by; the others are judged.
CALIBRATING = 2
Statistics = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Where a probe measures: all samples of a batch, all Linears at one half."""

    model: PreTrainedModel
    blocks: BlockMap
    statistics: Statistics

    def flat(self, sparsity: float = 0.5) -> np.ndarray:
        return np.full(len(self.blocks.linears()), sparsity)

    def candidates(self) -> list[np.ndarray]:
        return [self.flat(s) for s in (0.5, 0.4, 0.6)]

    def masks(self, pruner: Pruner) -> MaskedWeights:
        return MaskedWeights(self.blocks, pruner.masks, self.statistics)


@dataclass(frozen=True)
class ProbeCase:
    """
    :param make: the probe
    :param passes: passes through blocks that one batch takes, of a model of L blocks
    :param visits: how often a batch brings a block's weights to the device
    :param heads: how often a batch brings the output head's
    :param reads_weights: whether the Linears' own weights are needed at all
    :param same_batch: whether it compares forwards of one batch
    """

    make: Callable[[Place], Probe]
    passes: Callable[[int], int]
    visits: int = 1
    heads: int = 0
    reads_weights: bool = True
    same_batch: bool = False


def place(
    model: PreTrainedModel, batch: Batch, statistics: Statistics | None = None
) -> Place:
    blocks = find_blocks(model)
    if statistics is None:
        statistics = naive.square_sums(model, blocks, batch)
    return Place(model, blocks, statistics)


def run(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *probes: Probe,
    memory: int | None = None,
) -> None:
    run_probes(model, find_blocks(model), batches, probes, memory=memory)


def by_block(blocks: BlockMap, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """One number per prunable block -> the same for each of its Linears."""
    return Groups.at("block", blocks).spread(np.asarray(values))


def first_linears(blocks: BlockMap) -> dict[str, torch.nn.Linear]:
    """One Linear of each block, run exactly once whenever the block is."""
    return {b.name: next(iter(b.linears.values())) for b in blocks.blocks}


def make_judge(
    name: str, where: Place, pruner: Pruner, candidates: Sequence[np.ndarray]
) -> Probe:
    kind = JUDGES[name]
    if kind is MaskedLoss:
        return kind(where.blocks, where.masks(pruner), candidates)
    assert kind is PrunedLoss
    return kind(where.blocks, pruner, candidates, CALIBRATING)


def numbers(probe: Probe) -> np.ndarray:
    """What a probe has measured, as one vector; empty for one that only checks."""
    result = probe.result()
    return np.zeros(0) if result is None else _vector(result)


def _vector(result: Any) -> np.ndarray:
    if isinstance(result, NoiseProfile):
        return result.ratio
    if isinstance(result, LinearSlopes):
        return result.mean()
    if isinstance(result, Response):
        return result.response
    if isinstance(result, PrunedSlopes):
        result = {
            f"{index}.{name}": torch.stack(list(map(unpacked, weights))).float()
            for index, linears in result._kept.items()
            for name, weights in linears.items()
        }
    if isinstance(result, dict):
        parts = [torch.as_tensor(x).float().flatten() for x in result.values()]
        return torch.cat(parts).numpy()
    if isinstance(result, tuple):  # losses and tokens
        return np.asarray(result[0]).flatten()
    return np.asarray(result)


def _judged(judge: str, pruner: str, where: Place) -> Probe:
    return make_judge(judge, where, PRUNERS[pruner](), where.candidates())


def _together(where: Place) -> Probe:
    pruner, candidates = PRUNERS["sparsegpt"](), where.candidates()
    return PrunedLoss(where.blocks, pruner, candidates, CALIBRATING, together=True)


def _response(level: str, where: Place) -> Probe:
    groups, masks = Groups.at(level, where.blocks), where.masks(PRUNERS["wanda"]())
    return ResponseProbe(where.blocks, groups, masks, where.flat(), STEP)


def _masked_slope(where: Place) -> Probe:
    masks = where.masks(PRUNERS["wanda"]())
    slopes = MaskedSlopes(where.blocks, masks, where.flat(), STEP)
    return GradientProbe(where.blocks, slopes)


def _pruned_model(pruner: str, where: Place) -> Probe:
    return PrunedModel(where.blocks, PRUNERS[pruner](), where.flat(), STEP)


def _pruned_slope(pruner: str, where: Place) -> Probe:
    tokens = torch.arange(3, 35).view(2, 16) % where.model.config.vocab_size
    pruned = _pruned_model(pruner, where)
    run(where.model, [{"input_ids": tokens}], pruned)
    return GradientProbe(where.blocks, pruned.result())


def _noise(dtype: str, where: Place) -> Probe:
    count = len(where.blocks)
    return NoiseProbe(where.blocks.prunable, count, 1e-2, 0, dtype=dtype)


def _passes_of_noise(blocks: int) -> int:
    # its own, the noisy ones, and the rounding floor's from the second block on
    return blocks + blocks * (blocks - 1) // 2 + blocks - 1


# Passes through a block per candidate: with its own weights, which are the model's own
# pass for the first one, and pruned.
# Of three candidates. The pruner's runs each twice, and the model's own pass in two
# parts.
JUDGE_PASSES = {"masks": 3, "pruner": 7}

PROBES: dict[str, ProbeCase] = {
    "statistics": ProbeCase(
        lambda where: InputStatistics(where.blocks), lambda count: count
    ),
    "second moments": ProbeCase(
        lambda where: GramProbe(where.blocks, Lsa()), lambda count: count
    ),
    **{
        f"{judge} of {pruner}": ProbeCase(
            partial(_judged, judge, pruner),
            partial(mul, JUDGE_PASSES[judge]),
            heads=1,
        )
        for judge in JUDGES
        for pruner in PRUNERS
    },
    "pruner of all candidates at once": ProbeCase(
        _together, partial(mul, JUDGE_PASSES["pruner"]), heads=1
    ),
    "response": ProbeCase(
        partial(_response, "block"), lambda count: count * (count + 3) // 2, heads=1
    ),
    # two groups in every block
    "response of parts": ProbeCase(
        partial(_response, "part"), lambda count: count + count * (count + 1), heads=1
    ),
    # without a limit; with one a block may run again for its backward pass
    "slope under masks": ProbeCase(
        _masked_slope, lambda count: count, visits=2, heads=1
    ),
    **{
        f"model pruned by {pruner}": ProbeCase(
            partial(_pruned_model, pruner), lambda count: 2 * count
        )
        for pruner in PRUNERS
    },
    **{
        f"slope of {pruner}": ProbeCase(
            partial(_pruned_slope, pruner),
            lambda count: count,
            visits=2,
            heads=1,
            reads_weights=False,
        )
        for pruner in PRUNERS
    },
    # of two batches the first takes 3 L passes, the second L
    "chain check": ProbeCase(
        lambda where: _ChainCheck(where.blocks, False),
        lambda count: 2 * count,
        same_batch=True,
    ),
    "part check": ProbeCase(
        lambda where: _PartCheck(where.blocks), lambda count: 2 * count
    ),
    "calls of Linears": ProbeCase(
        lambda where: _LinearCalls(where.blocks), lambda count: count
    ),
    # of a model in float32 the two are the same
    "noise": ProbeCase(partial(_noise, "model"), _passes_of_noise),
    "noise in float32": ProbeCase(partial(_noise, "float32"), _passes_of_noise),
}
