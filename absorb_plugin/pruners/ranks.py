"""
What llm-compressor's pruners leave out under torch.distributed: add up what the ranks
saw before pruning. Each rank sees its own calibration samples, and without this each
prunes by those alone, and writes over what the others wrote to weights that are shared.

Relies on private names of llm-compressor: `_num_samples`, `_module_names`, and where a
pruner's statistics lie.
"""

from collections.abc import Callable

import torch
from compressed_tensors.distributed import greedy_bin_packing
from compressed_tensors.offload import (
    get_execution_device,
    update_offload_parameter,
)
from compressed_tensors.offload.cache import DistributedCPUCache, DistributedDiskCache
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from loguru import logger
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.pruners.wrapped import wrap

__all__ = ["reduce_statistics"]

WARNING = (
    "{name} does not keep its statistics as absorb_plugin knows it ({reason}): under "
    "torch.distributed they are left as they are, and each rank prunes by its own "
    "calibration samples alone. Run on one rank, or set reduce_pruner_statistics: "
    "false to be rid of this warning"
)


def reduce_statistics(modifier: SparsityModifierBase, attribute: str) -> None:
    """
    From now on, until `unwrap`, `modifier.compress_modules` works on the samples of all
    ranks: each module is pruned by one of them, by the mean over all, and its weight is
    then told to the others. Nothing is done without a process group, or, with a
    warning, where the statistics are not kept as expected.

    :param modifier: a WandaPruningModifier, SparseGPTModifier or subclass
    :param attribute: where it keeps its statistics (`Pruner.rank_statistics`): Wanda's
        Σ‖x_j‖²/n and SparseGPT's 2·Σ x xᵀ/n are means over the n samples that the
        module has seen
    """
    if not distributed.active():
        return
    if _refused(modifier, attribute):
        return
    refused: list[bool] = []  # said once

    def compress(original: Callable[[], None]) -> None:
        if refused or _refused(modifier, attribute):
            refused.append(True)
            original()
        else:
            _compress_together(modifier, attribute, original)

    wrap(modifier, "compress_modules", compress)


def _refused(modifier: SparsityModifierBase, attribute: str) -> bool:
    """Whether on some rank the statistics are not kept as expected."""
    found = distributed.gather(_unexpected(modifier, attribute))
    reasons = [reason for reason in found if reason]
    if reasons and distributed.is_first():
        name = type(modifier).__name__
        logger.warning(WARNING.format(name=name, reason=reasons[0]))
    return bool(reasons)


def _unexpected(modifier: SparsityModifierBase, attribute: str) -> str | None:
    """What is not as expected in the way it keeps its statistics; None if nothing."""
    for name in (attribute, "_num_samples", "_module_names"):
        if not isinstance(getattr(modifier, name, None), dict):
            return f"{name} is no dict"
    counts, statistics = modifier._num_samples, getattr(modifier, attribute)
    if not all(type(count) is int for count in counts.values()):
        return "_num_samples holds something else than ints"
    if not all(isinstance(statistics.get(m), torch.Tensor) for m in counts):
        return f"{attribute} lacks a module that _num_samples counts"
    if not all(module in modifier._module_names for module in counts):
        return "_module_names lacks a module that _num_samples counts"
    return None


def _compress_together(
    modifier: SparsityModifierBase, attribute: str, original: Callable[[], None]
) -> None:
    samples, statistics = modifier._num_samples, getattr(modifier, attribute)
    # in the same order on all ranks, which `samples` is not where experts differ
    modules = list(modifier._module_names)
    owners = _add_up(modules, statistics, samples)
    # also a barrier: nobody reads a weight that its owner still writes
    with distributed.fail_together():
        original()
    for number, owner in owners.items():
        _take_over(modules[number], owner)


def _add_up(
    modules: list[Module],
    statistics: dict[Module, torch.Tensor],
    samples: dict[Module, int],
) -> dict[int, int]:
    """
    Put together what the ranks saw, weighted by their numbers of samples. Each module's
    mean and count stay in `statistics` and `samples` of one rank, its owner, alone.

    :param modules: all that may have been seen, alike on all ranks
    :return: index in `modules` -> owner, for those that some rank has seen
    """
    mine = {
        number: (samples[module], statistics[module].shape, statistics[module].device)
        for number, module in enumerate(modules)
        if module in samples
    }
    parts = distributed.gather(mine)
    seen = sorted({number for part in parts for number in part})
    totals = {n: sum(part[n][0] for part in parts if n in part) for n in seen}
    shapes = {n: shape for part in parts for n, (_, shape, _) in part.items()}
    kinds = {n: where.type for part in parts for n, (*_, where) in part.items()}
    _, _, owners = greedy_bin_packing(
        list(seen), distributed.ranks(), lambda n: shapes[n].numel()
    )
    for number in seen:
        module, total = modules[number], totals[number]
        mean = statistics.pop(module, None)
        if mean is not None:
            mean *= samples.pop(module) / total
        if mean is None:
            # Hessians may be offloaded
            here = get_execution_device(module) if kinds[number] != "cpu" else "cpu"
            mean = torch.zeros(shapes[number], device=here)
        mean = distributed.add_to(mean, owners[number])
        if mean is not None:
            statistics[module], samples[module] = mean, total
    return dict(owners)


def _take_over(module: Module, owner: int) -> None:
    """Give the module the weight that its owner has."""
    parameters, weight = module._parameters, module.weight
    assert isinstance(weight, torch.Tensor)
    received = distributed.broadcast(weight.detach(), owner)
    if distributed.rank() == owner:
        return
    if isinstance(parameters, DistributedCPUCache | DistributedDiskCache):
        # the owner has written what the ranks share: renew what is onloaded here
        with torch.no_grad():
            weight.copy_(received)
    else:
        update_offload_parameter(module, "weight", received)
