"""What the search asks for, measured; all ranks are told the same."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from absorb_plugin import distributed
from absorb_plugin.calibration import cut_tokens
from absorb_plugin.judges import MaskedLoss, PrunedLoss
from absorb_plugin.pruners.masks import MaskedWeights
from absorb_plugin.pruners.quantization import QuantizedLinears
from absorb_plugin.search.descent import Slopes, Stage
from absorb_plugin.search.line_search import Losses
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.signals import Context, Signal
from absorb_plugin.signals.noise import Noise, NoiseProfile

__all__ = [
    "dense_loss",
    "masked_loss",
    "measure_direction",
    "pruned_loss",
    "report_noise",
    "same_stages",
]

# Samples of the noise probe where noise is not the signal: enough for the report.
REPORT_SAMPLES = 1


def same_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Stages of a descent whose slopes are those of the first rank on all of them."""
    return [
        replace(stage, measure=partial(_same_slopes, stage.measure)) for stage in stages
    ]


def _same_slopes(
    measure: Callable[[np.ndarray], Slopes], allocation: np.ndarray
) -> Slopes:
    return distributed.from_first(measure(distributed.from_first(allocation)))


def measure_direction(
    context: Context, signal: Signal, allocation: np.ndarray
) -> np.ndarray:
    """Δ of every Linear, the same on all ranks."""
    allocation = distributed.from_first(allocation)
    direction = distributed.from_first(signal.direction(context, allocation))
    return context.groups.spread(direction)


def masked_loss(context: Context, candidates: Sequence[np.ndarray]) -> Losses:
    """Losses under masks on the samples of the search, the same on all ranks."""
    candidates = distributed.from_first(candidates)
    probe = MaskedLoss(context.blocks, context.masks, candidates)
    return _judged(context, "Held-out loss", context.samples.search, probe)


def pruned_loss(
    context: Context,
    candidates: Sequence[np.ndarray],
    quantized: QuantizedLinears | None = None,
) -> Losses:
    """
    Losses by the pruner's arithmetic on samples that chose nothing.

    :param quantized: what is quantised afterwards, and judged with it
    """
    candidates, samples = distributed.from_first(candidates), context.samples
    pruning, judged = samples.pruning, [*samples.pruning, *samples.confirm]
    probe = PrunedLoss(
        context.blocks,
        context.pruner,
        candidates,
        len(pruning),
        together=context.pruner.hessians,
        quantized=quantized,
    )
    # the ranks take the same steps, and the room of each is its own
    if not all(distributed.gather(context.runner.has_room(probe.needs, judged))):
        probe.release()
    what = f"Pruning as {context.pruner.name} does"
    return _judged(context, what, judged, probe)


def dense_loss(context: Context) -> Losses:
    """
    Losses of the dense model on the samples of `pruned_loss`.

    :raises ValueError: if one is not finite
    """
    return _dense_loss(context, context.samples.confirm)


def _dense_loss(context: Context, samples: Sequence[dict]) -> Losses:
    nothing = [np.zeros(len(context.groups.linears))]
    masks = MaskedWeights(context.blocks, context.pruner.masks, {})
    probe = MaskedLoss(context.blocks, masks, nothing)
    sums, tokens = distributed.from_first(
        context.runner.run("Dense loss", samples, probe)
    )
    if not np.isfinite(sums).all():
        raise ValueError(
            "model: the loss of the dense model is not finite on some calibration "
            "samples, though its blocks put out finite numbers: check the weights "
            "after the blocks (final norm, lm_head) and the dtype (float16 overflows "
            "in some models, use bfloat16)"
        )
    return sums, tokens


def _judged(
    context: Context, what: str, samples: Sequence[dict], probe: MaskedLoss | PrunedLoss
) -> Losses:
    """
    An overflow is the worst of losses, not none; ranks decide by the first's.

    :raises ValueError: if it is none of pruning
    """
    sums, tokens = distributed.from_first(context.runner.run(what, samples, probe))
    sums = np.where(np.isnan(sums), np.inf, sums)
    if np.isinf(sums).all(axis=0).any():
        _dense_loss(context, samples)
    return sums, tokens


def report_noise(
    settings: AllocationSettings, context: Context, signal: Signal
) -> NoiseProfile | None:
    """The noise probe's profile, where it is the signal or a report wants it."""
    if settings.strength == 0:
        return None
    if isinstance(signal, Noise):
        return signal.measured(context)
    if settings.report_dir is None:
        return None
    tokens = settings.measuring().tokens
    samples = context.samples.in_turn()[:REPORT_SAMPLES]
    few = [cut_tokens(sample, tokens) for sample in samples]
    return Noise().profile(context, few)
