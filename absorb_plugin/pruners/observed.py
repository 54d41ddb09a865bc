"""What a pruner observes of the inputs of a block's Linears, and prunes it by."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.nn import Linear

from absorb_plugin.forward.inputs import real_tokens
from absorb_plugin.forward.linears import watched_inputs
from absorb_plugin.forward.parts import current_part
from absorb_plugin.pruners.base import Pruner
from absorb_plugin.pruners.factor import Factor

__all__ = ["Observed", "observed_inputs", "prune_observed"]


class Observed:
    """
    What a pruner observes of the inputs of a block's Linears.

    :param groups: sums of what it observed, or what the ranks made of them, and the
        names of the Linears that they are the inputs of
    """

    def __init__(self) -> None:
        self.groups: list[tuple[torch.Tensor | Factor, list[str]]] = []
        self._home: dict[str, int] = {}  # name -> index of its group

    def add(self, observed: torch.Tensor, name: str) -> None:
        """Of the inputs of a Linear, which others may share (`share`)."""
        if name in self._home:  # of other samples of the batch
            total = self.groups[self._home[name]][0]
            assert isinstance(total, torch.Tensor)
            total.add_(observed)
        else:
            self._home[name] = len(self.groups)
            self.groups.append((observed, [name]))

    def share(self, name: str, first: str) -> None:
        """`name` has the inputs of `first`."""
        if name not in self._home:
            self._home[name] = self._home[first]
            self.groups[self._home[first]][1].append(name)


def prune_observed(
    pruner: Pruner,
    linears: Mapping[str, Linear],
    observed: Sequence[Observed],
    sparsities: Sequence[Mapping[str, Sequence[float]]],
) -> list[dict[str, list[torch.Tensor]]]:
    """
    What a pruner makes of a block, for each of several sets of inputs.

    :param linears: relative name -> Linear
    :param sparsities: per set of inputs, relative name -> sparsities
    :return: per set of inputs, relative name -> pruned weights, one per sparsity
    """
    pruned: list[dict[str, list[torch.Tensor]]] = [{} for _ in observed]
    # an expert may have seen tokens of one set only
    alike: dict[tuple[str, ...], list[tuple[int, torch.Tensor | Factor]]] = {}
    for number, one in enumerate(observed):
        for total, names in one.groups:
            alike.setdefault(tuple(names), []).append((number, total))
    for group, sets in alike.items():
        weights = [linears[name].weight for name in group]
        wanted = [[sparsities[number][name] for name in group] for number, _ in sets]
        found = pruner.prune_each(weights, [total for _, total in sets], wanted)
        for (number, _), own in zip(sets, found, strict=True):
            pruned[number] |= dict(zip(group, own, strict=True))
    return pruned


@contextmanager
def observed_inputs(
    observe: Callable[[torch.Tensor], torch.Tensor],
    linears: Mapping[str, Linear],
    mask: torch.Tensor,
) -> Iterator[Observed]:
    """
    Within the context the Linears of one block are watched while the model runs it.

    :param observe: as of `Pruner`
    :param linears: relative name -> Linear
    :param mask: True where a token counts, (batch, tokens)
    """
    found = Observed()
    last: torch.Tensor | None = None  # what entered the last Linear
    first = ""  # the first Linear that it entered

    def note(name: str, x: torch.Tensor) -> None:
        nonlocal last, first
        own = mask[current_part()]
        if not x.numel() or not own.any():  # an expert without tokens; none to count
            return
        if last is x:
            found.share(name, first)
            return
        last, first = x, name
        rows, counted = real_tokens(x.detach(), own)
        found.add(observe(rows[counted]), name)

    with watched_inputs(linears, note):
        yield found
