"""
A block that the ranks of torch.distributed prune together: each sees its own samples,
what they observed is added up, and every Linear is pruned by one of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.offload import disable_onloading, get_execution_device
from torch.nn import Linear

from absorb_plugin import distributed
from absorb_plugin.pruners.base import Pruner
from absorb_plugin.pruners.weights import Observed, prune_observed

__all__ = ["Work", "pruned_together", "shared_out", "told"]

Names = tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """
    Of one set of inputs of a block's Linears.

    :param observed: by all ranks, of what this one prunes
    :param owners: names of Linears that share an input -> the rank that prunes them,
        the same on all ranks
    """

    observed: Observed
    owners: dict[Names, int]


def shared_out(
    linears: Mapping[str, Linear],
    observed: Observed,
    loads: list[float] | None = None,
) -> Work:
    """
    Add up what the ranks observed, each group where it is pruned. Within
    `distributed.fail_together`.

    :param linears: relative name -> Linear
    :param observed: by this rank; it is empty afterwards
    :param loads: what every rank has got to do of the block so far, added to; None for
        nothing
    """
    if distributed.ranks() == 1:
        return Work(observed, {})
    loads = [0.0] * distributed.ranks() if loads is None else loads
    mine = {tuple(names): total for total, names in observed.groups}
    observed.groups.clear()
    shapes: dict[Names, torch.Size] = {}
    for one in distributed.meet({names: x.shape for names, x in mine.items()}):
        shapes |= one
    work = {
        names: sum(linears[name].out_features for name in names) * shape.numel()
        for names, shape in shapes.items()
    }
    found = Work(Observed(), {})
    for names in sorted(work, key=lambda names: work[names], reverse=True):
        owner = loads.index(min(loads))
        loads[owner] += work[names]
        found.owners[names] = owner
        if names not in mine:
            mine[names] = torch.zeros(shapes[names], device=_device(linears[names[0]]))
    distributed.meet()  # all memory is there
    for names, owner in found.owners.items():
        total = distributed.add_to(mine.pop(names), owner)
        if total is not None:
            found.observed.groups.append((total, list(names)))
    return found


def told(
    linears: Mapping[str, Linear],
    pruned: dict[str, list[torch.Tensor]],
    wanted: Mapping[str, list[float]],
    owners: Mapping[Names, int],
) -> dict[str, list[torch.Tensor]]:
    """
    What all ranks have pruned, on each of them. Within `distributed.fail_together`.

    :param pruned: by this rank, relative name -> weights, one per sparsity; of several
        ranks it is empty afterwards
    :param wanted: relative name -> sparsities
    :param owners: of `Work`
    """
    if distributed.ranks() == 1:
        return pruned
    whole = {
        name: [weight.contiguous() for weight in pruned.pop(name)]
        if owner == distributed.rank()
        else [_like(linears[name]) for _ in wanted[name]]
        for names, owner in owners.items()
        for name in names
    }
    distributed.meet()  # all memory is there
    for names, owner in owners.items():
        for name in names:
            for weight in whole[name]:
                distributed.broadcast_in_place(weight, owner)
    return whole


def pruned_together(
    pruner: Pruner,
    linears: Mapping[str, Linear],
    observed: Observed,
    wanted: Mapping[str, list[float]],
) -> dict[str, list[torch.Tensor]]:
    """
    What all ranks make of a block. Within `distributed.fail_together`.

    :param observed: by this rank
    :param wanted: relative name -> sparsities
    :return: relative name -> weights, one per sparsity
    """
    work = shared_out(linears, observed)
    (own,) = prune_observed(pruner, linears, [work.observed], [wanted])
    work.observed.groups.clear()
    return told(linears, own, wanted, work.owners)


def _like(linear: Linear) -> torch.Tensor:
    """Room for a weight where the Linear computes, without onloading its own."""
    with disable_onloading():
        own = linear.weight
    return torch.empty(own.shape, dtype=own.dtype, device=_device(linear))


def _device(linear: Linear) -> torch.device:
    return torch.device(get_execution_device(linear))
