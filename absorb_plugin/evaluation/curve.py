"""Loss over sparsity for uniform, base and ours: one load, one pass of statistics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb_plugin import distributed
from absorb_plugin.calibration import samples_of
from absorb_plugin.choices import budget_of
from absorb_plugin.evaluation.allocation import set_up
from absorb_plugin.evaluation.oneshot import quantization_of
from absorb_plugin.files import json_numbers
from absorb_plugin.language_model import check_ids
from absorb_plugin.measuring import dense_loss, pruned_loss
from absorb_plugin.method import Method
from absorb_plugin.overflow import exp, expm1
from absorb_plugin.pruners import PRUNERS
from absorb_plugin.pruners.present import ModelZeros
from absorb_plugin.pruners.quantization import QuantizedLinears
from absorb_plugin.search.budget import Budget, OutOfReach
from absorb_plugin.search.confirm import confirm
from absorb_plugin.search.line_search import Losses, gain
from absorb_plugin.search.quality import QuantizationCost
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.torch_state import plain_torch

__all__ = ["Curve", "CurvePoint", "as_dict", "knee", "measure_curve"]

ALLOCATIONS = ("uniform", "base", "ours")
# A growth of perplexity that most users would take.
BEARABLE = 0.05
# A growth of the loss beyond which no one reads the percents [nats].
MULTIPLE = 5.0


@dataclass(frozen=True)
class CurvePoint:
    """
    :param sparsity: S
    :param increases: of "uniform", "base" and "ours": growth of the loss over the dense
        model, nats per token
    :param errors: their standard errors over samples; NaN for one sample
    """

    sparsity: float
    increases: Mapping[str, float]
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """
    :param dense: loss of the dense model, nats per token
    :param tokens: predicted tokens that it was judged on
    :param points: ascending in sparsity
    :param chosen_by: whether the search went by the samples that it was judged on, of
        which there are so few
    :param quantization: what is quantised afterwards, and what that costs where nothing
        is pruned; every increase is with it
    """

    dense: float
    tokens: int
    points: Sequence[CurvePoint]
    chosen_by: bool = False
    quantization: QuantizationCost | None = None


@plain_torch()
def measure_curve(
    model: PreTrainedModel,
    samples: Dataset,
    sparsities: Sequence[float],
    settings: AllocationSettings,
    *,
    pruner: str,
    quantize: str | None = None,
) -> Curve:
    """
    Judged by the pruner's arithmetic, on held-out samples. The search runs once, at the
    middle; every other budget starts from its neighbour's allocation.

    :param samples: rows of `input_ids` and `attention_mask`
    :param sparsities: budgets, ascending
    :param pruner: name of the pruner, with its default settings
    :param quantize: as of `absorb prune`, what pruned weights are judged as
    :raises ValueError: naming a sparsity that zeros which are there leave out of reach,
        or Linears that cannot be quantised so
    """
    arithmetic = PRUNERS[pruner]()
    batches = samples_of(samples)
    check_ids(model, batches)
    with set_up(model, settings) as blocks:
        caps = {s: budget_of(blocks, s, settings, arithmetic) for s in sparsities}
        zeros = ModelZeros.of(blocks, arithmetic)
        for cap in caps.values():  # what cannot be met is told of at once
            _check_zeros(zeros, cap, warn=cap is caps[sparsities[0]])
        quantized = None
        if quantize is not None:
            config = quantization_of(model, quantize)
            quantized = QuantizedLinears.to_be(config, model, blocks, quantize)
        method = Method(model, blocks, batches, pruner=arithmetic, settings=settings)
        zeros = method.zeros(zeros)
        budgets = {sparsity: zeros.within(cap) for sparsity, cap in caps.items()}
        with method.context.runner.kept_onloaded():
            dense, tokens = dense_loss(method.context)
            ours: dict[float, np.ndarray] = {}
            points = []
            judge = partial(pruned_loss, method.context, quantized=quantized)
            cost = None
            if quantized is not None:
                nothing = np.zeros(len(blocks.linears()))
                alone = gain(judge([nothing])[0][0], dense[0], tokens)
                cost = QuantizationCost(quantized.modifiers, *alone)
            order = _from_the_middle(sparsities)
            hidden = not distributed.is_first()
            for sparsity in tqdm(order, desc="Sparsities", disable=hidden):
                budget = budgets[sparsity]
                base = method.base(budget)
                found = method.found(budget, _near(ours, sparsity), base)
                taken = confirm(found, base.sparsity, budget, judge)
                ours[sparsity] = taken.sparsity
                names = ("uniform", "base", taken.chosen)
                sums = np.stack([taken.sums[name] for name in names])
                points.append(_point(sparsity, (sums, tokens), dense[0]))
    points.sort(key=lambda point: point.sparsity)
    return Curve(
        float(dense.sum() / tokens.sum()),
        int(tokens.sum()),
        points,
        chosen_by=method.context.samples.confirm is method.context.samples.search,
        quantization=cost,
    )


def _check_zeros(zeros: ModelZeros, budget: Budget, warn: bool) -> None:
    try:
        zeros.within(budget, warn=warn)
    except OutOfReach as error:
        raise ValueError(
            f"sparsities={budget.sparsity:g} is out of reach: the model has zeros "
            f"already, which leave between {error.least:.4f} and {error.most:.4f}"
        ) from error


def _from_the_middle(sparsities: Sequence[float]) -> list[float]:
    """So that each has a neighbour before it."""
    middle = sparsities[len(sparsities) // 2]
    return sorted(sparsities, key=lambda sparsity: abs(sparsity - middle))


def _near(ours: Mapping[float, np.ndarray], sparsity: float) -> np.ndarray | None:
    nearest = min(ours, key=lambda other: abs(other - sparsity), default=None)
    return None if nearest is None else ours[nearest]


def _point(sparsity: float, losses: Losses, dense: np.ndarray) -> CurvePoint:
    sums, tokens = losses
    found = {
        name: gain(own, dense, tokens)
        for name, own in zip(ALLOCATIONS, sums, strict=True)
    }
    return CurvePoint(
        sparsity,
        {name: increase for name, (increase, _) in found.items()},
        {name: error for name, (_, error) in found.items()},
    )


def knee(curve: Curve) -> str:
    """In words: up to where the model bears it."""
    bound = math.log1p(BEARABLE)
    kept = []
    for point in curve.points:
        if point.increases["ours"] > bound:
            break
        kept.append(point.sparsity)
    cost = curve.quantization
    if cost is not None and cost.increase > bound:
        return f"quantising alone costs {expm1(cost.increase):.0%} of perplexity"
    if not kept:
        first = curve.points[0]
        increase = first.increases["ours"]
        if increase > MULTIPLE:
            times = f"multiplies perplexity by {exp(increase):.3g}"
        else:
            times = f"costs {expm1(increase):.0%} of perplexity"
        return f"{first.sparsity:.1%} already {times}"
    return f"up to {kept[-1]:.1%} costs less than {BEARABLE:.0%} of perplexity"


def as_dict(curve: Curve, pruner: str, allocator: str) -> dict[str, Any]:
    """What `absorb curve --json` prints; None is what overflowed."""
    return {
        "pruner": pruner,
        "allocator": allocator,
        "tokens": curve.tokens,
        "chosen_by_the_same": curve.chosen_by,
        "dense_loss": curve.dense,
        "knee": knee(curve),
        "quantization": _quantization(curve.quantization),
        "points": [
            {
                "sparsity": point.sparsity,
                "loss_increase": _numbers(point.increases),
                "standard_error": _numbers(point.errors),
                "perplexity": _numbers(
                    {
                        name: exp(curve.dense + increase)
                        for name, increase in point.increases.items()
                    }
                ),
            }
            for point in curve.points
        ],
    }


def _quantization(cost: QuantizationCost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    found = {"loss_increase": cost.increase, "standard_error": cost.error}
    return {"quantize": cost.modifiers[0], **_numbers(found)}


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return dict(zip(values, json_numbers(values.values()), strict=True))
