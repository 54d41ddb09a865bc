"""Statistics of the Linears' inputs, gathered while a sweep passes by."""

from collections.abc import Callable, Mapping

import torch
from compressed_tensors.offload import get_execution_device
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.allocators.base import LinearGroup, LinearStatistics, Remember
from absorb_plugin.blocks import BlockMap, linear_parameters
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.sweep import Passenger, RunBlock

__all__ = ["InputStatistics", "groups_of", "unseen_linears"]


# Tokens squared at a time: what stays in a CPU's cache.
ROWS = 1024


class InputStatistics(Passenger):
    """
    Passenger of a sweep that adds up Σ x_j² over the tokens that enter each Linear.

    Its hooks are registered at a block's entry and removed before any other trajectory
    runs through it, so only the model's own pass is counted.

    :param blocks: whose prunable Linears to watch
    """

    kept = ("_sums", "_samples")

    def __init__(self, blocks: BlockMap) -> None:
        self._blocks = blocks
        self._sums: dict[str, torch.Tensor] = {}
        self._samples = 0
        self._handles: list = []
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def start(self, batch: Batch) -> None:
        self._mask = token_mask(batch)
        self._samples += len(self._mask)

    def enter(self, index: int, block: Module) -> None:
        watched = self._blocks.blocks[index]
        for name, linear in watched.linears.items():
            self._watch(watched.full_name(name), linear)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen = None

    def input_square_sums(self) -> dict[str, torch.Tensor]:
        """Full name of a Linear -> a_j, mean over samples of Σ_tokens x_j²."""
        samples = sum(distributed.gather(self._samples))
        sums = distributed.add(self._sums)
        means = {name: total / samples for name, total in sums.items()}
        for name, linear in self._blocks.linears().items():
            if name in means and name not in self._sums:  # other ranks saw tokens
                means[name] = means[name].to(get_execution_device(linear))
        return means

    def _watch(self, name: str, linear: torch.nn.Linear) -> None:
        def add(module: Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if not x.numel():  # an expert that no token was routed to
                return
            if self._seen is None or self._seen[0] is not x:
                # queries, keys and values are made of one input
                self._seen = (x, self._square_sum(x))
            square_sum = self._seen[1]
            if name in self._sums:
                square_sum = square_sum + self._sums[name]
            self._sums[name] = square_sum

        self._handles.append(linear.register_forward_pre_hook(add))

    def _square_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Σ x² over tokens that are no padding, float32 of shape (in_features,)."""
        rows, mask = x.flatten(0, -2), self._mask.flatten().to(x.device)
        # Experts of a mixture get fewer tokens, and padding among them cannot be told
        # apart.
        if len(rows) != len(mask):
            mask = mask.new_ones(len(rows))
        total = torch.zeros(x.shape[-1], dtype=torch.float32, device=x.device)
        for part, kept in zip(rows.split(ROWS), mask.split(ROWS), strict=True):
            total += kept.float() @ part.float().square()
        return total


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
    remember: Callable[[str], Remember] | None = None,
) -> list[LinearGroup]:
    """
    What an allocator ranks: one group per prunable block or per prunable Linear.

    :param input_square_sums: from `InputStatistics`, or empty; a Linear that saw no
        token (an expert never routed to) has zeros
    :param remember: full name of a Linear -> what its `LinearStatistics.remember` is
    """
    remembering = {}
    if remember is not None:
        remembering = {name: {"remember": remember(name)} for name in blocks.linears()}
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
                **remembering.get(block.full_name(name), {}),
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
