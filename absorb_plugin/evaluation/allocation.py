"""Allocate without pruning, and the result as plain data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from absorb_plugin._llmcompressor import linearize_moe, moe_calibration_context
from absorb_plugin.allocate import allocate
from absorb_plugin.allocation import Allocation
from absorb_plugin.allocators.base_allocation import base_allocation
from absorb_plugin.blocks import BlockMap, find_blocks
from absorb_plugin.cache import ProfileCache
from absorb_plugin.calibration import samples_of
from absorb_plugin.choices import (
    budget_of,
    choose_level,
    choose_signal,
    needs_text,
    warn_of_granularity,
    warn_of_other_weights,
)
from absorb_plugin.devices import computing_on_one_device
from absorb_plugin.limits import check_matched
from absorb_plugin.pruners import PRUNERS
from absorb_plugin.pruners.adapter import without_ignored
from absorb_plugin.pruners.present import ModelZeros
from absorb_plugin.report.profile import versions
from absorb_plugin.search.budget import check_budget
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.torch_state import plain_torch

__all__ = ["allocate_model", "as_dict", "ratios", "set_up"]


@contextmanager
def set_up(model: PreTrainedModel, settings: AllocationSettings) -> Iterator[BlockMap]:
    """
    Within the context a model is set up as by `oneshot`: it computes on one device, the
    weights of experts are Linears, and all tokens pass through each.

    :return: its blocks, with the Linears that may be pruned
    """
    with computing_on_one_device(model), moe_calibration_context():
        linearize_moe(model)
        blocks = without_ignored(model, find_blocks(model), settings.ignore)
        check_matched(settings.limits, [blocks])
        warn_of_other_weights(blocks)
        yield blocks


def allocate_model(
    model: PreTrainedModel,
    samples: Dataset | None,
    sparsity: float,
    settings: AllocationSettings,
    *,
    pruner: str = "wanda",
) -> Allocation:
    """
    Allocate without pruning, over all Linears of the decoder blocks.

    :param samples: rows of `input_ids` and `attention_mask`; None for none, where
        `needs_text` says that they are not needed
    :param sparsity: the budget S
    :param pruner: name of the pruner that it is for, with its default settings
    :raises ValueError: if there are no samples, and they are needed
    """
    check_budget(sparsity, settings.highest_sparsity())
    with set_up(model, settings) as blocks:
        if samples is None:
            return _allocate_by_weights(model, blocks, sparsity, pruner, settings)
        return allocate(
            model,
            blocks,
            samples_of(samples),
            sparsity=sparsity,
            pruner=PRUNERS[pruner](),
            settings=settings,
        )


@plain_torch()
def _allocate_by_weights(
    model: PreTrainedModel,
    blocks: BlockMap,
    sparsity: float,
    pruner: str,
    settings: AllocationSettings,
) -> Allocation:
    """The base allocation of an allocator that needs no forward of the model."""
    if needs_text(settings):
        raise ValueError(
            f"allocator {settings.allocator!r} or the correction runs the model on "
            "calibration samples, and there are none: give some"
        )
    arithmetic, directory = PRUNERS[pruner](), settings.profile_cache
    cap = budget_of(blocks, sparsity, settings, arithmetic)
    budget = ModelZeros.of(blocks, arithmetic).within(cap, warn=True)
    warn_of_granularity(settings)
    base = base_allocation(
        settings.base_allocator(),
        blocks,
        {},
        budget,
        granularity=settings.granularity,
        cache=None if directory is None else ProfileCache(directory, model),
    )
    return Allocation(
        blocks=blocks,
        level=choose_level(settings),
        signal=choose_signal(settings, blocks, arithmetic).name,
        budget=budget,
        base=base,
        sparsity=base.sparsity,
        direction=None,
    )


def as_dict(allocation: Allocation, allocator: str, pruner: str) -> dict[str, Any]:
    """What `absorb allocate --json` prints."""
    targets = allocation.linear_sparsities()
    bases = dict(zip(targets, allocation.base.sparsity.tolist(), strict=True))
    means = allocation.block_means(allocation.base.sparsity)
    finals = allocation.block_means(allocation.sparsity)
    blocks = []
    for row, index in enumerate(allocation.blocks.prunable):
        block = allocation.blocks.blocks[index]
        unique = _unique_ends(list(block.linears))
        linears = {}
        for name in block.linears:
            full = block.full_name(name)
            entry = {"base_sparsity": bases[full], "sparsity": targets[full]}
            if full in allocation.base.linear_metrics:
                entry["metric"] = float(allocation.base.linear_metrics[full])
            linears[name.rpartition(".")[2] if unique else name] = entry
        blocks.append(
            {
                "name": block.name,
                "parameters": block.parameters,
                "metric": float(allocation.base.metric[row]),
                "base_sparsity": float(means[row]),
                "sparsity": float(finals[row]),
                "linears": linears,
            }
        )
    return {
        "allocator": allocator,
        "pruner": pruner,
        "level": allocation.level,
        "sparsity": allocation.budget.sparsity,
        "achieved": allocation.achieved(),
        "blocks": blocks,
    }


def ratios(
    allocation: Allocation, settings: AllocationSettings, pruner: str, **source: Any
) -> dict[str, Any]:
    """
    The sparsity of every Linear, for other tools, with what it came from.

    :param source: model and calibration data, as they were named
    """
    fields = settings.model_dump(mode="json", exclude_unset=True)
    return {
        **source,
        "pruner": pruner,
        "sparsity": allocation.budget.sparsity,
        "achieved": allocation.achieved(),
        "settings": fields,
        "versions": versions(),
        "linears": allocation.linear_sparsities(),
    }


def _unique_ends(names: list[str]) -> bool:
    """Whether the last parts of the names tell them apart, as in most models."""
    return len({name.rpartition(".")[2] for name in names}) == len(names)
