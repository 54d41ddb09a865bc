"""What a pruner observes of the inputs of a block's Linears, and prunes it by."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch.nn import Linear, Module

from absorb_plugin.forward.inputs import real_tokens
from absorb_plugin.forward.parts import current_part
from absorb_plugin.pruners.base import Pruner
from absorb_plugin.pruners.factor import Factor

__all__ = ["Observed", "ObservedInputs", "prune_observed"]


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


class ObservedInputs:
    """
    Watches the Linears of one block while the model runs it.

    :param pruner: observes
    :param linears: relative name -> Linear
    :param mask: True where a token counts, (batch, tokens)
    """

    def __init__(
        self, pruner: Pruner, linears: Mapping[str, Linear], mask: torch.Tensor
    ) -> None:
        self._pruner, self._linears, self._mask = pruner, linears, mask
        self._last: torch.Tensor | None = None  # what entered the last Linear
        self._first = ""  # the first Linear that it entered

    @contextmanager
    def watched(self) -> Iterator[Observed]:
        found = Observed()
        with ExitStack() as stack:
            for name, linear in self._linears.items():
                note = partial(self._note, found, name)
                # in one line: between two lines an interrupt may come
                stack.callback(linear.register_forward_pre_hook(note).remove)
            yield found
            self._last = None

    def _note(
        self, found: Observed, name: str, module: Module, args: tuple[torch.Tensor, ...]
    ) -> None:
        x = args[0]
        mask = self._mask[current_part()]
        if not x.numel() or not mask.any():  # an expert without tokens; none to count
            return
        if self._last is x:
            found.share(name, self._first)
            return
        self._last, self._first = x, name
        rows, counted = real_tokens(x.detach(), mask)
        found.add(self._pruner.observe(rows[counted]), name)
