"""
One forward of the model, many trajectories.

A block's weights are resident exactly while the model runs it. So while ONE forward
of the model passes block k, a hook runs block k again on every other hidden state that
has come this far: noisy copies, or copies that met other weights on their way. Each
block is onloaded once per batch, whatever the number of trajectories.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from compressed_tensors.offload import disable_offloading, get_execution_device
from loguru import logger
from torch.nn import Module
from tqdm import tqdm

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, calibrating, split_samples
from absorb_plugin.devices import empty_cache
from absorb_plugin.forward.block_io import (
    BlockCall,
    hidden_state,
    hollow,
    put_hidden_state,
    without_cache_arguments,
)
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.joined import joined_own
from absorb_plugin.forward.linears import replaced_weights
from absorb_plugin.forward.memory import Footprint, footprint
from absorb_plugin.forward.parts import Parts
from absorb_plugin.forward.probe import Probe, RunBlock
from absorb_plugin.forward.resident import release
from absorb_plugin.language_model import (
    WITHOUT_FORWARD,
    forward_inputs,
    language_model,
)

__all__ = ["NonFiniteHiddenState", "run_probes"]

T = TypeVar("T")


class NonFiniteHiddenState(ValueError):
    """A block's output holds NaN or infinity."""


def run_probes(
    model: Module,
    blocks: BlockMap,
    batches: Iterable[Batch],
    probes: Sequence[Probe],
    *,
    memory: int | None = None,
    in_parts: bool = False,
    placeholder: Batch | None = None,
    joined: bool = False,
    description: str = "Measuring",
) -> None:
    """
    Run the model over the batches while the probes measure.

    :param model: the model, wrapped or not; its weights are not touched
    :param blocks: all decoder blocks, in the order in which they run
    :param batches: calibration batches; cut to fewer samples where the run would take
        more than `memory`
    :param memory: limit in bytes of what the run may take beside the model; None for
        no limit. What cannot be cut to it goes on with a warning
    :param in_parts: whether blocks may run a batch a few samples at a time, so that
        fewer batches visit every block; the probes tell samples by `current_part`
    :param placeholder: of one sample, what a rank runs and forgets to keep in step with
        those that have more batches
    :param joined: whether ranks in step onload their rows alone of the blocks' own
        weights, and put them together
    :param description: label of the progress bar
    :raises ValueError: if a block stands in two places
    :raises torch.OutOfMemoryError: if not even one sample fits the device
    :raises NonFiniteHiddenState: naming the first block with NaN or infinity, unless a
        probe runs pruned weights that may overflow
    """
    model = language_model(model)
    _check_run_once(blocks)
    head = OutputHead(model, blocks.modules)
    with ExitStack() as stack:
        stack.enter_context(calibrating(model))
        parts = Parts()
        needs = [probe.needs for probe in probes]
        need = footprint(model, blocks.modules, needs, memory)
        left = partial(need.left, memory=sys.maxsize if memory is None else memory)
        hooks = _BlockHooks(blocks, probes, head, parts, joined, left)
        stack.push(hooks)  # before they are added: an interrupt may come in between
        hooks.__enter__()
        head.chunk_bytes = need.chunk
        if memory is not None and need.fixed > memory:
            release(model)  # it needs the room of blocks that are kept
        stack.enter_context(parts.applied(blocks.modules))
        every = _Every.of(probes, placeholder)
        divisible = not any(one.single_batch for one in needs)
        by_part = parts if in_parts or not divisible else None
        batches = [*_fitting(batches, need, memory, by_part, divisible)]
        _run_all(model, batches, hooks, description, every, by_part, divisible)


def _check_run_once(blocks: BlockMap) -> None:
    """Where a block stands in two places nothing tells one call from the other."""
    seen: dict[Module, int] = {}
    for index, block in enumerate(blocks.blocks):
        if (first := seen.setdefault(block.module, index)) != index:
            raise ValueError(
                f"model: block {index} is block {first} once more ({block.name}), and "
                "what each of the two does cannot be measured. `strength: 0` works, "
                "with an allocator that needs no activations: alpha_pruning, atp or "
                "uniform"
            )


@dataclass(frozen=True)
class _Every:
    """
    The ranks that run in step.

    :param placeholder: that this one runs where others have more batches; None if there
        are no others to wait for
    :param forgotten: whether what is measured with it is undone
    """

    placeholder: Batch | None
    forgotten: bool

    @classmethod
    def of(cls, probes: Sequence[Probe], placeholder: Batch | None) -> "_Every":
        in_step = distributed.ranks() > 1 and any(probe.in_step for probe in probes)
        single = any(probe.needs.single_batch for probe in probes)
        return cls(placeholder if in_step else None, not single)

    def told(self, item: T) -> list[T]:
        """What every rank says."""
        return [item] if self.placeholder is None else distributed.meet(item)

    def own(self, batches: Iterable[Batch]) -> list[Batch]:
        """Those of this rank's samples."""
        return [batch for batch in batches if batch is not self.placeholder]

    def equally_many(self, batches: Iterable[Batch]) -> deque[Batch]:
        """As the rank that has the most."""
        own = deque(self.own(batches))
        for _ in range(max(self.told(len(own))) - len(own)):
            assert self.placeholder is not None
            own.append(self.placeholder)
        return own


def _run_all(
    model: Module,
    batches: Sequence[Batch],
    hooks: "_BlockHooks",
    description: str,
    every: _Every,
    parts: Parts | None,
    divisible: bool,
) -> None:
    """
    Batch by batch; where one does not fit the device, without the blocks that are kept
    there, and where that is not enough, in halves from there on.

    :param every: the ranks that do so together
    :param parts: in which blocks run a batch; None if they run all of it
    :param divisible: whether a batch may be cut
    """
    waiting = every.equally_many(batches)
    hidden = not distributed.is_first()
    with tqdm(total=len(waiting), desc=description, disable=hidden) as bar:
        while waiting:
            batch = waiting.popleft()
            said = _out_of_memory(model, batch, hooks, every)
            if said is None:
                bar.update()
                continue
            waiting.appendleft(batch)
            if any(every.told(hooks.release(model))):
                continue
            samples = len(batch["input_ids"])
            at_a_time = 1 if parts is None else min(parts.size or samples, samples)
            if said and at_a_time == 1:
                _check_divisible(said, samples if divisible else 1)
            _warn_of_halves(description)
            if parts is not None and at_a_time > 1:
                parts.size = at_a_time // 2
            elif divisible and samples > 1:
                own = every.own(waiting)
                waiting = deque(split_samples(own, samples // 2))
            waiting = every.equally_many(waiting)
            bar.total = bar.n + len(waiting)


def _out_of_memory(
    model: Module, batch: Batch, hooks: "_BlockHooks", every: _Every
) -> str | None:
    """
    What the device says if a batch does not fit it, nothing ("") if it is another
    rank's; all is then as before.
    """
    before = hooks.measured()
    try:
        device = get_execution_device(model)
        hooks.run(model, {name: tensor.to(device) for name, tensor in batch.items()})
        every.told(None)
        if batch is every.placeholder and every.forgotten:
            hooks.forget(before)
        return None
    except torch.OutOfMemoryError as error:
        said = str(error) or "out of memory"
    except distributed.OtherRankFailed as error:
        if not error.again:
            raise
        said = ""
    # not earlier: the error holds on to the tensors of the frames that it passed
    hooks.forget(before)
    empty_cache()
    if said and every.placeholder is not None:
        distributed.tell_out_of_memory(said)
    return said


def _check_divisible(said: str, samples: int) -> None:
    """:raises torch.OutOfMemoryError: if fewer samples at a time are no way out"""
    if samples == 1:
        raise torch.OutOfMemoryError(
            f"{said}. That was for a single sample: use fewer probe_tokens or a "
            "smaller max_seq_length, or a device with more memory"
        )


@cache
def _warn_of_halves(description: str) -> None:
    """Once, not for every half."""
    logger.warning(
        f"{description}: a batch does not fit the memory of the device. Going on with "
        "half as many samples at a time, or fewer. A smaller probe_memory sets a limit "
        "beforehand"
    )


def _fitting(
    batches: Iterable[Batch],
    need: Footprint,
    memory: int | None,
    parts: Parts | None,
    divisible: bool,
) -> Iterator[dict]:
    """
    Batches of so few samples that they stay within memory.

    :param parts: told how few samples at a time blocks are to run, so that a batch is
        cut only where all its hidden states would not fit; None if they run all of it
    :param divisible: whether a batch may be cut
    """
    for batch in batches:
        samples, tokens = batch["input_ids"].shape
        if memory is not None:
            if divisible:
                fits = need.samples if parts is None else need.kept_samples
                samples = min(samples, fits(tokens, memory))
            part = samples
            if parts is not None:
                part = need.part(samples, tokens, memory)
                if part < samples:  # not of batches that are small by themselves
                    parts.size = min(parts.size or part, part)
            most = need.whole(samples, tokens, part)
            if most > memory:
                _warn_of_memory(memory, most, need.fixed, samples, tokens)
        yield from split_samples([batch], samples)


@cache
def _warn_of_memory(
    memory: int, most: int, fixed: int, samples: int, tokens: int
) -> None:
    """Once for each case, not once per batch."""
    logger.warning(
        f"probe_memory is {memory / 2**30:.3g} GiB, but measuring takes up to "
        f"{most / 2**30:.3g} GiB beside the model: {fixed / 2**30:.3g} GiB for the "
        f"weights of one block and the logits, the rest for {samples} x {tokens} "
        "tokens. Going on; if memory runs out use fewer probe_tokens or "
        "max_seq_length, or a device with more"
    )


class _BlockHooks:
    """The hooks on the blocks, as a context manager that leaves none behind."""

    def __init__(
        self,
        blocks: BlockMap,
        probes: Sequence[Probe],
        head: OutputHead,
        parts: Parts,
        joined: bool,
        left: Callable[[int, int], int],
    ) -> None:
        self._blocks, self._probes, self._head = blocks, probes, head
        self._parts, self._joined, self._left = parts, joined, left
        self._hooks = ExitStack()
        self._onloaded = ExitStack()
        self._listening = False
        self._call: BlockCall | None = None  # of the block that runs
        self._shape = torch.Size()  # of the ids: (batch, tokens)

    def __enter__(self) -> "_BlockHooks":
        for index, block in enumerate(self._blocks.modules):
            # Not HooksMixin.register_hook: those are asleep while we calibrate.
            add_enter, add_leave = (
                # before those of the user, which may change what enters the block
                partial(
                    block.register_forward_pre_hook,
                    partial(self._enter, index),
                    prepend=True,
                    with_kwargs=True,
                ),
                partial(
                    block.register_forward_hook,
                    partial(self._leave, index),
                    with_kwargs=True,
                ),
            )
            # Both steps in one line: between two lines an interrupt may come.
            self._hooks.callback(add_enter().remove)
            self._hooks.callback(add_leave().remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()
        self._onloaded.close()
        for probe in self._probes:
            probe.close()

    def run(self, model: Module, batch: Batch) -> None:
        """The whole of a batch."""
        left = self._left(*batch["input_ids"].shape) if len(self._probes) == 1 else 0
        for probe in self._probes:
            probe.left = left
            probe.start(batch)
        self._listening, self._shape = True, batch["input_ids"].shape
        try:
            if any(probe.wants_logits for probe in self._probes):
                self._head.run_with(batch)
            else:
                model(**forward_inputs(model, batch))
        finally:
            self._listening = False
        for probe in self._probes:
            probe.finish(batch, self._head)

    def release(self, model: Module) -> bool:
        """Of all that is kept on the device, give the room back; if there is any."""
        held = [release(model)]
        held += [probe.release() for probe in self._probes]
        return any(held)

    def measured(self) -> list[dict[str, Any]]:
        """What every probe has measured; a batch adds to it."""
        return [
            {name: copy(vars(probe)[name]) for name in probe.state}
            for probe in self._probes
        ]

    def forget(self, measured: list[dict[str, Any]]) -> None:
        """Go back to what was measured before a batch that broke off."""
        self._onloaded.close()
        self._call = None
        for probe, state in zip(self._probes, measured, strict=True):
            probe.close()
            vars(probe).update(state)

    def _enter(
        self, index: int, block: Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        if not self._listening:
            return None
        call = BlockCall.of(block, *without_cache_arguments(args, kwargs))
        # from here to the end of _leave the block is onloaded once
        self._onloaded.enter_context(disable_offloading())
        if self._joined:
            linears = self._blocks.blocks[index].linears
            self._onloaded.enter_context(replaced_weights(linears, joined_own(linears)))
        before: torch.Tensor | None = None
        for probe in self._probes:
            probe.enter(index, block)
            before = probe.redirect(index, call.hidden)
        self._parts.apart = max(probe.apart for probe in self._probes)
        given = call.put(call.hidden if before is None else before)
        self._call = BlockCall(*given, call.key)
        return given

    def _leave(
        self, index: int, block: Module, args: tuple, kwargs: dict, output: object
    ) -> object:
        if not self._listening:
            return None
        self._parts.apart = 0
        call, self._call = self._call, None
        assert call is not None
        after = hidden_state(output, block)
        self._head.output = hollow(output)
        self._check(index, after)
        run = RunBlock(block, call)
        self._listening = False
        onward: torch.Tensor | None = None
        try:
            for probe in self._probes:
                onward = probe.leave(index, call.hidden, after, run)
        finally:
            self._listening = True
        self._onloaded.close()
        return None if onward is None else put_hidden_state(output, onward)

    def _check(self, index: int, after: torch.Tensor) -> None:
        name = self._blocks.blocks[index].name
        if after.dim() != 3 or after.shape[:2] != self._shape:
            raise ValueError(
                f"model: block {name} puts out a hidden state of shape "
                f"{tuple(after.shape)}, not (batch, tokens, hidden), of "
                f"{tuple(self._shape)}: architectures with several parallel streams, "
                f"as Gemma 3n, or another order are not supported. {WITHOUT_FORWARD}"
            )
        overflows = any(probe.may_overflow for probe in self._probes)
        if overflows or torch.isfinite(after).all():
            return
        if any(probe.runs_pruned for probe in self._probes):
            raise NonFiniteHiddenState(
                f"block {name} puts out NaN or infinity under the weights that pruning "
                "leaves, where the dense model need not: load it in bfloat16 if it is "
                "in float16, ask for less sparsity, or keep the base allocation "
                "(strength: 0)"
            )
        raise NonFiniteHiddenState(
            f"block {name} puts out NaN or infinity on the calibration text: check the "
            "weights and the dtype (float16 overflows in some models, use bfloat16)"
        )
