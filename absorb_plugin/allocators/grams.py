"""One number per Linear from its weight and the second moments of its inputs."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.allocators.base import Allocator
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch
from absorb_plugin.forward.probe import Needs, Probe, RunBlock
from absorb_plugin.plugins import run_measure, version_of
from absorb_plugin.precision import gram
from absorb_plugin.pruners.observed import observed_inputs
from absorb_plugin.pruners.together import shared_out

__all__ = ["GramProbe"]


class GramProbe(Probe):
    """
    Measures the Linears of a block as soon as all samples have passed it, so that of
    the matrices Σ x xᵀ, which for a whole model would be larger than its weights, those
    of one block are held. Under torch.distributed each rank has its share of the
    samples, and of the Linears.

    :param blocks: whose prunable Linears to measure
    :param allocator: its `measure` gets weight and matrix
    """

    state = ("_numbers",)
    own_weights = True
    in_step = True

    def __init__(self, blocks: BlockMap, allocator: Allocator) -> None:
        self._blocks, self._allocator = blocks, allocator
        self._version = version_of(allocator)
        self._numbers: dict[str, float] = {}
        self._samples = 0  # of all ranks; 0 if it runs by itself
        self._in_force = ExitStack()

    def share(self, samples: Sequence[dict]) -> list[dict]:
        self._samples = len(samples)
        return distributed.share(samples)

    @property
    def needs(self) -> Needs:
        # copies of one Linear's weight, as where it is pruned
        return Needs(pruned=True, hessians=True, single_batch=True)

    def start(self, batch: Batch) -> None:
        self._mask = self.counted(batch)

    def enter(self, index: int, block: Module) -> None:
        linears = self._blocks.blocks[index].linears
        watched = observed_inputs(gram, linears, self._mask)
        self._observed = self._in_force.enter_context(watched)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self._in_force.close()
        block = self._blocks.blocks[index]
        work = shared_out(block.linears, self._observed)
        for total, names in work.observed.groups:
            assert isinstance(total, torch.Tensor)
            mean = total / (self._samples or len(self._mask))
            for name in names:
                weight = block.linears[name].weight.detach()
                full = block.full_name(name)
                # its own copy: others have the same inputs, and may be told after it
                own = mean.clone() if len(names) > 1 else mean
                self._numbers[full] = run_measure(self._allocator, full, weight, own)
        del self._observed

    def close(self) -> None:
        self._in_force.close()

    def result(self) -> dict[str, float]:
        """Full name of a Linear -> its number, of those that saw a token."""
        numbers: dict[str, float] = {}
        for part in distributed.gather(self._numbers):
            numbers |= part
        return numbers
