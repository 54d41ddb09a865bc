"""Every probe, made for a model: one list that drives what must hold of all."""

from collections.abc import Mapping

import numpy as np
import torch

from absorb_plugin.blocks import BlockMap
from absorb_plugin.forward.inputs import InputStatistics
from absorb_plugin.forward.probe import Probe
from absorb_plugin.groups import Groups
from absorb_plugin.judges import MaskedLoss, PrunedLoss
from absorb_plugin.pruners import PRUNERS
from absorb_plugin.pruners.weights import MaskedSlopes, MaskedWeights
from absorb_plugin.signals.gradient import GradientProbe
from absorb_plugin.signals.noise import NoiseProbe
from absorb_plugin.signals.pruned_model import PrunedModel
from absorb_plugin.signals.response import ResponseProbe

__all__ = ["PROBES", "SINGLE_BATCH", "make_probe", "square_sums"]

PROBES = (
    "noise",
    "statistics",
    "response",
    "gradient",
    "masked loss",
    *(f"{what} by {pruner}" for what in ("loss", "model") for pruner in PRUNERS),
)
SINGLE_BATCH = tuple(name for name in PROBES if " by " in name)


def square_sums(blocks: BlockMap) -> dict[str, torch.Tensor]:
    """Something for Σ x² of every Linear's input."""
    return {
        name: torch.rand(linear.in_features, device=linear.weight.device) + 0.1
        for name, linear in blocks.linears().items()
    }


def make_probe(
    which: str, blocks: BlockMap, sums: Mapping[str, torch.Tensor], candidates: int = 3
) -> Probe:
    """
    :param which: one of PROBES
    :param sums: from `square_sums`
    :param candidates: of the judges; those that take a single batch prune by its first
        two samples
    """
    flat, count = np.full(len(blocks.linears()), 0.5), len(blocks)
    if which == "noise":
        return NoiseProbe(range(count), count, 1e-2, 0)
    if which == "statistics":
        return InputStatistics(blocks)
    pruner = PRUNERS[which.rpartition(" ")[2] if " by " in which else "wanda"]()
    if which.startswith("loss by"):
        return PrunedLoss(blocks, pruner, [flat] * candidates, 2)
    if which.startswith("model by"):
        return PrunedModel(blocks, pruner, flat, 0.1)
    masks = MaskedWeights(blocks, pruner.masks, sums)
    if which == "response":
        return ResponseProbe(blocks, Groups.at("block", blocks), masks, flat, 0.1)
    if which == "gradient":
        return GradientProbe(blocks, MaskedSlopes(blocks, masks, flat, 0.1))
    return MaskedLoss(blocks, pruner.masks, sums, [flat] * candidates)
