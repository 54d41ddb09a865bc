"""Statistics of the Linears' inputs, gathered while a sweep passes by."""

from collections.abc import Mapping

import torch
from torch.nn import Module

from absorb_plugin.allocators.base import LinearGroup, LinearStatistics
from absorb_plugin.blocks import BlockMap, linear_parameters
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.sweep import Passenger, RunBlock

__all__ = ["InputStatistics", "groups_of", "unseen_linears"]


class InputStatistics(Passenger):
    """
    Passenger of a sweep that adds up Σ x_j² over the tokens that enter each Linear.

    Its hooks are registered at a block's entry and removed before any other trajectory
    runs through it, so only the model's own pass is counted.

    :param blocks: whose prunable Linears to watch
    """

    def __init__(self, blocks: BlockMap) -> None:
        self._linears = [list(block.linears.items()) for block in blocks.blocks]
        self._names = [block.full_name for block in blocks.blocks]
        self._sums: dict[str, torch.Tensor] = {}
        self._samples = 0
        self._handles: list = []

    def start(self, batch: Batch) -> None:
        self._mask = token_mask(batch)
        self._samples += len(self._mask)

    def enter(self, index: int, block: Module) -> None:
        for name, linear in self._linears[index]:
            self._watch(self._names[index](name), linear)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def input_square_sums(self) -> dict[str, torch.Tensor]:
        """Full name of a Linear -> a_j, mean over samples of Σ_tokens x_j²."""
        return {name: total / self._samples for name, total in self._sums.items()}

    def _watch(self, name: str, linear: torch.nn.Linear) -> None:
        def add(module: Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].float()
            if not x.numel():  # an expert that no token was routed to
                return
            square_sums = x.flatten(0, -2).square()
            if len(square_sums) == self._mask.numel():
                # A whole batch, flattened or not. Experts of a mixture get fewer
                # tokens, and padding among them cannot be told apart.
                square_sums *= self._mask.reshape(-1, 1)
            square_sum = square_sums.sum(dim=0)
            if name in self._sums:
                square_sum += self._sums[name]
            self._sums[name] = square_sum

        self._handles.append(linear.register_forward_pre_hook(add))


def unseen_linears(
    blocks: BlockMap, input_square_sums: Mapping[str, torch.Tensor]
) -> list[str]:
    """
    Full names of the prunable Linears that saw no token: experts never routed to.

    :param input_square_sums: from `InputStatistics`
    """
    return [name for name in blocks.linears() if name not in input_square_sums]


def groups_of(
    blocks: BlockMap,
    input_square_sums: Mapping[str, torch.Tensor],
    granularity: str = "block",
) -> list[LinearGroup]:
    """
    What an allocator ranks: one group per prunable block or per prunable Linear.

    :param input_square_sums: from `InputStatistics`, or empty; a Linear that saw no
        token (an expert never routed to) has zeros
    """
    groups = []
    for index in blocks.prunable:
        block = blocks.blocks[index]
        statistics = {
            name: LinearStatistics(
                linear,
                input_square_sums.get(
                    block.full_name(name), torch.zeros(linear.in_features)
                )
                if input_square_sums
                else None,
            )
            for name, linear in block.linears.items()
        }
        if granularity == "block":
            groups.append(LinearGroup(block.name, statistics, block.parameters))
        else:
            groups += [
                LinearGroup(
                    block.full_name(name),
                    {name: statistics[name]},
                    linear_parameters(linear),
                )
                for name, linear in block.linears.items()
            ]
    return groups
