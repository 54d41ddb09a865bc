"""The model as the pruner makes it of an allocation, block after block."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch.nn import Linear, Module

from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.forward.linears import given, replaced_weights
from absorb_plugin.forward.probe import Needs, Probe, RunBlock
from absorb_plugin.pruners.base import MaskPruner, Pruner
from absorb_plugin.pruners.weights import (
    Observed,
    ObservedInputs,
    PrunedSlopes,
    band,
    block_sparsities,
)

__all__ = ["PrunedInputs", "PrunedModel"]


class _Sequential(Probe):
    """
    Prunes block after block by one batch. The inputs of a block are those that the
    pruned blocks before it give.

    :param blocks: all blocks; their prunable Linears are pruned
    :param pruner: how weights are pruned
    :param allocation: one sparsity per prunable Linear
    """

    def __init__(
        self, blocks: BlockMap, pruner: Pruner, allocation: np.ndarray
    ) -> None:
        self._blocks, self._pruner = blocks, pruner
        self._allocation = allocation
        self._sparsities = block_sparsities(blocks, allocation)
        self._in_force = ExitStack()

    def start(self, batch: Batch) -> None:
        self._mask = token_mask(batch)

    def enter(self, index: int, block: Module) -> None:
        linears = self._blocks.blocks[index].linears
        watch = ObservedInputs(self._pruner, linears, self._mask)
        self._observed = self._in_force.enter_context(watch.watched())

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> torch.Tensor:
        self._in_force.close()
        linears = self._blocks.blocks[index].linears
        wanted = {
            name: self._wanted(s) for name, s in self._sparsities.get(index, {}).items()
        }
        pruned = self._observed.prune(self._pruner, linears, wanted)
        self._keep(index, self._observed, pruned)
        weights = {name: partial(given, found[0]) for name, found in pruned.items()}
        with replaced_weights(linears, weights):
            return run(before)

    def close(self) -> None:
        self._in_force.close()

    def _wanted(self, sparsity: float) -> list[float]:
        """Sparsities to prune a Linear to; the network goes on with the first."""
        return [sparsity]

    def _keep(
        self, index: int, observed: Observed, pruned: Mapping[str, list[torch.Tensor]]
    ) -> None:
        """
        What is kept of a block.

        :param pruned: relative name -> the weights, one per sparsity wanted
        """
        raise NotImplementedError


class PrunedModel(_Sequential):
    """
    Keeps each block's weights at three sparsities at once: what the allocation says,
    and a step to both sides of that.

    :param step: δ
    """

    def __init__(
        self, blocks: BlockMap, pruner: Pruner, allocation: np.ndarray, step: float
    ) -> None:
        super().__init__(blocks, pruner, allocation)
        self._step = step
        self._kept: dict[int, dict[str, list[torch.Tensor]]] = {}

    @property
    def needs(self) -> Needs:
        return Needs(
            trajectories=1,
            pruned=PrunedSlopes.kept_weights,
            hessians=self._pruner.hessians,
            kept_weights=PrunedSlopes.kept_weights,
            single_batch=True,
        )

    def result(self) -> PrunedSlopes:
        """The pruned weights, where the model's own lie."""
        made_at = self._allocation
        return PrunedSlopes(self._blocks, self._kept, made_at, made_at, step=self._step)

    def _wanted(self, sparsity: float) -> list[float]:
        return [sparsity, *band(sparsity, self._step)]

    def _keep(
        self, index: int, observed: Observed, pruned: Mapping[str, list[torch.Tensor]]
    ) -> None:
        linears = self._blocks.blocks[index].linears
        self._kept[index] = {
            name: [weight.to(_home(linears[name])) for weight in weights]
            for name, weights in pruned.items()
        }


class PrunedInputs(_Sequential):
    """
    Σ x_j² of what enters the Linears of the pruned network. Masks that go by these are
    those of the pruner, which sees the inputs that are left when all before is pruned;
    the dense network's are only nearly so.
    """

    state = ("_sums",)

    def __init__(
        self, blocks: BlockMap, pruner: MaskPruner, allocation: np.ndarray
    ) -> None:
        super().__init__(blocks, pruner, allocation)
        self._sums: dict[str, torch.Tensor] = {}

    @property
    def needs(self) -> Needs:
        return Needs(trajectories=1, pruned=1, single_batch=True)

    def result(self) -> dict[str, torch.Tensor]:
        """Full name of a Linear -> a_j, mean over samples of Σ_tokens x_j²."""
        return self._sums

    def _keep(
        self, index: int, observed: Observed, pruned: Mapping[str, list[torch.Tensor]]
    ) -> None:
        block, samples = self._blocks.blocks[index], len(self._mask)
        for total, names in observed.groups:
            self._sums |= {block.full_name(name): total / samples for name in names}


def _home(linear: Linear) -> torch.device:
    """Where the weight lies while it is not in use; not on disk."""
    parameters = getattr(linear._parameters, "offloaded_values", linear._parameters)
    home = parameters["weight"].device
    return torch.device("cpu") if home.type == "meta" else home
