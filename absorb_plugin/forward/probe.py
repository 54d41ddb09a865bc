"""What measures something while the model runs, and what it needs for that."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.forward.block_io import BlockCall, hidden_state
from absorb_plugin.forward.head import OutputHead

__all__ = ["Needs", "Probe", "RunBlock"]


@dataclass(frozen=True)
class Needs:
    """
    What a probe takes beside the model. Memory (`forward.memory`) and the cost model
    (integration/benchmarks/cost_model.py) add this up.

    :param trajectories: hidden states alive at once, beside the model's own
    :param pruned: number of sparsities that it runs or compares each weight at
    :param backward: runs blocks backward
    :param float32: runs blocks in float32
    :param sums: adds up a number per input of every Linear
    :param hessians: adds up Σ x xᵀ of a Linear's inputs and factors it
    :param sets: of inputs that a block is pruned for at once
    :param kept_weights: pruned copies of the whole model that are kept
    :param joined: copies of a block that the ranks put together from their rows; of
        what is kept each then has its rows alone
    :param single_batch: all samples must pass a block before the next one
    """

    trajectories: int = 0
    pruned: int = 0
    backward: bool = False
    float32: bool = False
    sums: bool = False
    hessians: bool = False
    sets: int = 0
    kept_weights: int = 0
    joined: int = 0
    single_batch: bool = False

    def __or__(self, other: "Needs") -> "Needs":
        """Of two probes in one forward: numbers add up, the rest is either's."""
        mine, theirs = vars(self), vars(other)
        return Needs(
            **{
                field.name: mine[field.name] + theirs[field.name]
                if field.type in (int, "int")
                else mine[field.name] or theirs[field.name]
                for field in fields(self)
            }
        )


class Probe:
    """
    What measures during a forward: override what you need.

    All hidden states have shape (batch, tokens, hidden). `state` names the attributes
    that hold what was measured; what the others were set to when the probe was made
    tells one measurement from another (`profile_cache`).

    Class attributes:
        state: as above
        apart: in the model's own pass so many first samples of a batch run apart from
            the others: of what an expert of a mixture gets nothing tells the sample
        wants_logits: the model's own pass runs its output head, which is switched off
            otherwise, and the head that `finish` is given holds its logits
        may_overflow: the model's own pass runs pruned weights, and what overflows under
            them is a bad loss and no error
        runs_pruned: likewise, and no loss is worth having of what overflows
        own_weights: blocks run their own weights alone; where these are offloaded, each
            rank onloads some rows, and the probe is then in step
        in_step: under torch.distributed all ranks run equally many batches, and pass
            every block together, for they share the work on its weights
        idle: this rank has no sample of its own, and runs another's to keep in step. A
            probe that takes a single batch must not count it; what another did, the
            runner undoes
        left: bytes of the limit that are over when the next batch runs, beside what
            `needs` says; none for a probe that is not alone in its forward
    """

    state: tuple[str, ...] = ()
    apart: int = 0
    wants_logits: bool = False
    may_overflow: bool = False
    runs_pruned: bool = False
    own_weights: bool = False
    in_step: bool = False
    idle: bool = False
    left: int = 0

    def share(self, samples: Sequence[dict]) -> list[dict]:
        """This rank's part of what is to run, before it does."""
        return distributed.share(samples)

    def counted(self, batch: Batch) -> torch.Tensor:
        """As `token_mask`; of a rank that is idle no token counts."""
        mask = token_mask(batch)
        return torch.zeros_like(mask) if self.idle else mask

    @property
    def needs(self) -> Needs:
        """What it takes beside the model."""
        return Needs()

    def start(self, batch: Batch) -> None:
        """A new batch, on the model's device, is about to run."""

    def enter(self, index: int, block: Module) -> None:
        """The model is about to run block `index`."""

    def redirect(self, index: int, before: torch.Tensor) -> torch.Tensor | None:
        """
        :return: what the model's own pass enters block `index` with in place of
            `before`, if not with that; for a probe that is alone in its forward
        """
        return None

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: "RunBlock"
    ) -> torch.Tensor | None:
        """
        The model's own pass took `before` to `after`; `run` takes any other hidden
        state through the same block, with the block's own mask and rotary embedding.

        :return: what the model's own pass goes on with in place of `after`, if not
            with that; for a probe that is alone in its forward
        """
        return None

    def finish(self, batch: Batch, head: OutputHead) -> None:
        """All blocks have run; `head` turns hidden states into logits."""

    def release(self) -> bool:
        """
        Give back what it keeps on the device beyond the limit on its memory; whether
        there was any.
        """
        return False

    def close(self) -> None:
        """The run is over, perhaps by an error: leave no hook behind."""

    def result(self) -> Any:
        """What was measured over all batches, and over all ranks."""
        raise NotImplementedError


class RunBlock:
    """
    Takes other hidden states through a block that the model has just run, with the
    block's own mask and rotary embedding.

    :param call: the model's own call
    """

    def __init__(self, block: Module, call: BlockCall) -> None:
        self._block, self._call = block, call

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """:param hidden: shape (batch, tokens, hidden)"""
        args, kwargs = self._call.put(hidden)
        return hidden_state(self._block(*args, **kwargs), self._block)

    def of_samples(self, part: slice) -> "RunBlock":
        """For hidden states of some samples of the batch."""
        return RunBlock(self._block, self._call.of_samples(part, self._block))

    @contextmanager
    def in_float32(self) -> Iterator["RunBlock"]:
        """
        Within the context the block's parameters are float32, and so is what the
        yielded runner computes. One block's copy; the weights come back as they were.
        """
        call = self._call
        wide = {name: _float32(value) for name, value in call.kwargs.items()}
        args = tuple(map(_float32, call.args))
        with _float32_parameters(self._block):
            yield RunBlock(self._block, BlockCall(args, wide, call.key))


def _float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, tuple):  # cosines and sines
        return tuple(map(_float32, value))
    return value


@contextmanager
def _float32_parameters(block: Module) -> Iterator[None]:
    narrow = [
        tensor
        # getattr, for an offloaded tensor is fetched that way; it stays onloaded here
        for module in block.modules()
        for name in (*module._parameters, *module._buffers)
        if isinstance(tensor := getattr(module, name), torch.Tensor)
        and tensor.is_floating_point()
        and tensor.dtype != torch.float32
    ]
    originals = [tensor.data for tensor in narrow]
    try:
        for tensor in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, original in zip(narrow, originals, strict=True):
            tensor.data = original
