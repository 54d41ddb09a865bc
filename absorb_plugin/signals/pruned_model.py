"""What the pruner makes of the model under an allocation, and a little beside it."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch
from absorb_plugin.forward.linears import all_given, replaced_weights
from absorb_plugin.forward.probe import Needs, Probe, RunBlock
from absorb_plugin.pruners.base import Pruner
from absorb_plugin.pruners.masks import block_sparsities
from absorb_plugin.pruners.observed import observed_inputs
from absorb_plugin.pruners.packed import HOST, Packed
from absorb_plugin.pruners.slopes import PrunedSlopes, band
from absorb_plugin.pruners.together import pruned_together

__all__ = ["PrunedModel"]


class PrunedModel(Probe):
    """
    Prunes block after block by one batch, each at three sparsities at once: what the
    allocation says, and a step to both sides of that. The inputs of a block are those
    that the pruned blocks before it give.

    :param blocks: all blocks; their prunable Linears are pruned
    :param pruner: how weights are pruned
    :param allocation: one sparsity per prunable Linear
    :param step: δ

    Under torch.distributed each rank has its share of the samples and of the Linears
    that are to be pruned.

    Attributes:
        room: bytes of pruned weights that may still stay on an accelerator
        joined: whether this rank's rows alone are kept
    """

    own_weights = True
    runs_pruned = True
    in_step = True

    def __init__(
        self, blocks: BlockMap, pruner: Pruner, allocation: np.ndarray, step: float
    ) -> None:
        self._blocks, self._pruner, self._step = blocks, pruner, step
        self.room, self.joined = 0, False
        self._allocation = allocation
        self._sparsities = block_sparsities(blocks, allocation)
        self._in_force = ExitStack()
        self._kept: dict[int, dict[str, list[torch.Tensor | Packed]]] = {}

    @property
    def needs(self) -> Needs:
        return Needs(
            trajectories=1,
            pruned=PrunedSlopes.kept_weights,
            hessians=self._pruner.hessians,
            kept_weights=PrunedSlopes.kept_weights,
            joined=1 if self.joined else 0,
            single_batch=True,
        )

    def start(self, batch: Batch) -> None:
        self._mask = self.counted(batch)

    def enter(self, index: int, block: Module) -> None:
        linears = self._blocks.blocks[index].linears
        watched = observed_inputs(self._pruner.observe, linears, self._mask)
        self._observed = self._in_force.enter_context(watched)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> torch.Tensor:
        self._in_force.close()
        linears = self._blocks.blocks[index].linears
        wanted = {
            name: [s, *band(s, self._step)]
            for name, s in self._sparsities.get(index, {}).items()
        }
        pruned = pruned_together(self._pruner, linears, self._observed, wanted)
        del self._observed
        self._kept[index] = {
            name: self._placed(weights) for name, weights in pruned.items()
        }
        weights = all_given({name: found[0] for name, found in pruned.items()})
        with replaced_weights(linears, weights):
            return run(before)

    def release(self) -> bool:
        self.room = 0
        return self.result().release()

    def close(self) -> None:
        self._in_force.close()

    def result(self) -> PrunedSlopes:
        """The pruned weights: on the host, or while there is room on the device."""
        made_at = self._allocation
        return PrunedSlopes(
            self._blocks,
            self._kept,
            made_at,
            made_at,
            step=self._step,
            joined=self.joined,
        )

    def _placed(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor | Packed]:
        if self.joined:  # copies, or the others' rows would be held too
            rows = distributed.row_share(len(weights[0]))
            weights = [weight[rows].clone() for weight in weights]
        if all(weight.device.type == "cpu" for weight in weights):
            return list(weights)
        packed = list(map(Packed.of, weights))
        size = sum(one.nbytes for one in packed)
        if size <= self.room:
            self.room -= size
            return [*packed]
        return [one.to(HOST) for one in packed]
