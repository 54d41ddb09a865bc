"""
The method on one screen: calibration batches -> statistics -> base allocation -> signal
-> correction, judged on held-out samples -> confirmed by the pruner's own arithmetic.
Each step is one of `method.Method`.
"""

from collections.abc import Sequence

from loguru import logger
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.allocation import Allocation
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch
from absorb_plugin.choices import budget_of, choose_level
from absorb_plugin.language_model import check_ids
from absorb_plugin.measuring import report_noise
from absorb_plugin.method import Method
from absorb_plugin.pruners import Pruner
from absorb_plugin.pruners.present import ModelZeros
from absorb_plugin.pruners.quantization import QuantizedLinears
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.signals.noise import Noise
from absorb_plugin.torch_state import plain_torch

__all__ = ["Allocation", "allocate"]


@plain_torch()
def allocate(
    model: Module,
    blocks: BlockMap,
    batches: Sequence[Batch],
    *,
    sparsity: float,
    pruner: Pruner,
    settings: AllocationSettings,
    quantized: QuantizedLinears | None = None,
) -> Allocation:
    """
    :param model: the dense model, wrapped or not; its weights are not touched
    :param blocks: its blocks, with the Linears that will be pruned
    :param batches: tokenised calibration batches, the same on all ranks
    :param sparsity: the budget S, or the largest one where a loss is the aim
    :param pruner: that will prune
    :param settings: the recipe's fields
    :param quantized: what Linears are quantised to afterwards, where a loss is the aim
    """
    check_ids(model, batches)
    cap = budget_of(blocks, sparsity, settings, pruner)
    if cap.sparsity < sparsity:
        logger.info(
            f"max_sparsity and limits leave {cap.sparsity:.4f} of the sparsity "
            f"{sparsity:g}, the most that max_loss_increase may find"
        )
    zeros = ModelZeros.of(blocks, pruner)
    zeros.within(cap, warn=True)  # more than the budget are told of at once
    method = Method(
        model, blocks, batches, pruner=pruner, settings=settings, quantized=quantized
    )
    budget = method.zeros(zeros).within(cap)
    search, confirmed, quality, direction = None, None, None, None
    with method.context.runner.kept_onloaded():
        if settings.max_loss_increase is not None:
            quality = method.largest_budget(budget, settings.max_loss_increase)
            budget = budget.at(quality.found.sparsity)
        base = method.base(budget)
        final = base.sparsity
        if quality is not None:
            final = quality.found.allocation
        elif settings.strength == "auto":
            search = method.search(base, budget)
            final, direction = search.sparsity, search.direction
        elif settings.strength != 0:
            final, direction = method.step(final, budget, settings.strength)
        if method.undecided(final, base, budget):
            search, confirmed = method.confirmed(final, base, budget, search)
            final = confirmed.sparsity
            direction = direction if search is None else search.direction
        noise = report_noise(settings, method.context, method.signal)
    signal = method.signal
    return Allocation(
        blocks=blocks,
        level=choose_level(settings),
        signal=signal.name,
        budget=budget,
        base=base,
        sparsity=distributed.from_first(final),
        direction=direction,
        noise=noise,
        noise_settings=signal if isinstance(signal, Noise) else Noise(),
        search=search,
        confirmed=confirmed,
        quality=quality,
        samples=method.uses(compared=not (confirmed is None and quality is None)),
        unseen=method.unseen,
    )
