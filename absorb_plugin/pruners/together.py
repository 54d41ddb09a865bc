"""
A block that the ranks of torch.distributed prune together: each sees its own samples,
what they observed is added up, and every Linear is pruned by one of them; the widest,
where all would wait for it, by several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.offload import disable_onloading, get_execution_device
from torch.nn import Linear

from absorb_plugin import distributed
from absorb_plugin.pruners.base import Pruner
from absorb_plugin.pruners.factor import Factor
from absorb_plugin.pruners.observed import Observed, prune_observed

__all__ = ["Work", "own_part", "pruned_together", "shared_out", "told"]

Names = tuple[str, ...]


# Columns from which on a matrix takes so long that the ranks factor it together.
WIDE = 8192


@dataclass(frozen=True)
class Work:
    """
    Of one set of inputs of a block's Linears.

    :param observed: by all ranks, of what this one prunes
    :param owners: names of Linears that share an input -> the rank that prunes them to
        each sparsity, the same on all ranks
    """

    observed: Observed
    owners: dict[Names, tuple[int, ...]]


def shared_out(
    linears: Mapping[str, Linear],
    observed: Observed,
    pruner: Pruner | None = None,
    *,
    copies: int = 1,
    sets: int = 1,
    loads: list[float] | None = None,
) -> Work:
    """
    Add up what the ranks observed, each group where it is pruned. A matrix that all
    would wait for is factored by all, and what is more than a rank's share of the block
    is split by sparsities. Within `distributed.fail_together`.

    :param linears: relative name -> Linear
    :param observed: by this rank; it is empty afterwards
    :param pruner: that factors; None if nobody does
    :param copies: that are pruned of every Linear
    :param sets: of inputs that the ranks work at, this being one
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
    together = pruner is not None and pruner.factors_together
    wide = _widest(shapes) if together and distributed.ranks() > sets else None
    walks = {
        names: sum(linears[name].out_features for name in names) * shape.numel()
        for names, shape in shapes.items()
    }
    found = Work(Observed(), _owners(walks, copies, loads))
    for names in found.owners.keys() - mine.keys():
        mine[names] = torch.zeros(shapes[names], device=_device(linears[names[0]]))
    distributed.meet()  # all memory is there
    for names, owners in found.owners.items():
        own, keep = mine.pop(names), distributed.rank() in owners
        assert isinstance(own, torch.Tensor)
        total: torch.Tensor | Factor | None
        if names == wide:
            assert pruner is not None
            total = pruner.factored(own, keep)
        elif len(set(owners)) == 1:
            total = distributed.add_to(own, owners[0])
        else:
            everywhere = distributed.add_up(own)
            total = everywhere if keep else None
        del own
        if total is not None:
            found.observed.groups.append((total, list(names)))
    return found


def own_part(work: Work, wanted: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """
    What of all sparsities this rank prunes to.

    :param wanted: relative name -> sparsities
    """
    own = dict(wanted)
    for names, owners in work.owners.items():
        for name in names:
            pairs = zip(wanted[name], owners, strict=True)
            own[name] = [s for s, owner in pairs if owner == distributed.rank()]
    return own


def told(
    linears: Mapping[str, Linear],
    pruned: dict[str, list[torch.Tensor]],
    owners: Mapping[Names, Sequence[int]],
) -> dict[str, list[torch.Tensor]]:
    """
    What all ranks have pruned, on each of them. Within `distributed.fail_together`.

    :param pruned: by this rank, relative name -> weights, one per sparsity; of several
        ranks it is empty afterwards
    :param owners: of `Work`
    """
    if distributed.ranks() == 1:
        return pruned
    whole: dict[str, list[torch.Tensor]] = {}
    for names, ranks in owners.items():
        for name in names:
            own = iter(pruned.pop(name, ()))
            whole[name] = [
                next(own).contiguous()
                if owner == distributed.rank()
                else _like(linears[name])
                for owner in ranks
            ]
    distributed.meet()  # all memory is there
    for names, ranks in owners.items():
        for name in names:
            for weight, owner in zip(whole[name], ranks, strict=True):
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
    :param wanted: relative name -> sparsities, of all equally many
    :return: relative name -> weights, one per sparsity
    """
    copies = max(map(len, wanted.values()), default=1)
    work = shared_out(linears, observed, pruner, copies=copies)
    own_wanted = own_part(work, wanted)
    (own,) = prune_observed(pruner, linears, [work.observed], [own_wanted])
    work.observed.groups.clear()
    return told(linears, own, work.owners)


def _owners(
    walks: Mapping[Names, int], copies: int, loads: list[float]
) -> dict[Names, tuple[int, ...]]:
    """
    The largest first, each where least is to do.

    :param walks: what one copy of a group takes
    :param loads: of every rank, added to
    :return: as of `Work`
    """
    fair = copies * sum(walks.values()) / distributed.ranks()
    owners: dict[Names, tuple[int, ...]] = {}
    for names in sorted(walks, key=lambda names: walks[names], reverse=True):
        parts = copies if copies * walks[names] > fair else 1
        chosen = []
        for _ in range(parts):
            chosen.append(loads.index(min(loads)))
            loads[chosen[-1]] += walks[names] * copies / parts
        owners[names] = tuple(chosen * (copies // parts))
    return owners


def _widest(shapes: Mapping[Names, torch.Size]) -> Names | None:
    """
    Whose inputs have a matrix that takes longer to factor than all others of the block.
    """
    if not shapes:
        return None
    work = {names: shape[-1] ** 3 for names, shape in shapes.items()}
    names = max(work, key=lambda names: work[names])
    alone = shapes[names][-1] >= WIDE and 2 * work[names] > sum(work.values())
    return names if alone else None


def _like(linear: Linear) -> torch.Tensor:
    """Room for a weight where the Linear computes, without onloading its own."""
    with disable_onloading():
        own = linear.weight
    return torch.empty(own.shape, dtype=own.dtype, device=_device(linear))


def _device(linear: Linear) -> torch.device:
    return torch.device(get_execution_device(linear))
