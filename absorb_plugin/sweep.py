"""
One forward of the model, many trajectories.

A block's weights are resident exactly while the model runs it. So while ONE forward
of the model passes block k, a hook runs block k again on every other hidden state that
has come this far: noisy copies, or copies that met other weights on their way. Each
block is onloaded once per batch, whatever the number of trajectories.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, get_execution_device
from loguru import logger
from torch.nn import Module
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb_plugin import distributed
from absorb_plugin.calibration import Batch, calibrating, split_samples
from absorb_plugin.memory import CHUNK_BYTES, Footprint, footprint

__all__ = [
    "NonFiniteHiddenState",
    "Passenger",
    "RunBlock",
    "Tail",
    "replaced_forward",
    "sweep",
]


class NonFiniteHiddenState(ValueError):
    """A block's output holds NaN or infinity."""


class RunBlock:
    """
    Takes other hidden states through a block that the model has just run, with the
    block's own mask and rotary embedding.

    :param args: positional arguments of the model's own call
    :param kwargs: keyword arguments of the same
    """

    def __init__(self, block: Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._block, self._args, self._kwargs = block, args, kwargs

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """:param hidden: shape (batch, tokens, hidden)"""
        if self._args:
            output = self._block(hidden, *self._args[1:], **self._kwargs)
        else:
            output = self._block(**{**self._kwargs, "hidden_states": hidden})
        return _hidden_state(output)

    @contextmanager
    def in_float32(self) -> Iterator["RunBlock"]:
        """
        Within the context the block's parameters are float32, and so is what the
        yielded runner computes. One block's copy; the weights come back as they were.
        """
        wide = {name: _widened(value) for name, value in self._kwargs.items()}
        with _float32_parameters(self._block):
            yield RunBlock(self._block, tuple(map(_widened, self._args)), wide)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, tuple):  # cosines and sines
        return tuple(map(_widened, value))
    return value


@contextmanager
def _float32_parameters(block: Module) -> Iterator[None]:
    narrow = [
        tensor
        # getattr, for an offloaded tensor is fetched that way; _enter keeps it onloaded
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


class Passenger:
    """
    What rides along on a sweep: override what you need.

    All hidden states have shape (batch, tokens, hidden). `trajectories` says how many
    of them the passenger carries at most, `masked` whether it runs blocks under masks,
    `differentiates` whether it runs them backward, `widens` whether it runs them in
    float32, `compensates` whether it inverts Hessians: they set the memory of a batch.
    `undivided` says that all samples must pass a block before the next one.
    `kept` names the attributes that hold what was measured; what the others were set to
    when it was made tells one measurement from another (`profile_cache`).
    """

    trajectories = 0
    masked = False
    differentiates = False
    widens = False
    compensates = False
    undivided = False
    kept: tuple[str, ...] = ()

    def start(self, batch: Batch) -> None:
        """A new batch, on the model's device, is about to run."""

    def enter(self, index: int, block: Module) -> None:
        """The model is about to run block `index`."""

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> torch.Tensor | None:
        """
        The model's own pass took `before` to `after`; `run` takes any other hidden
        state through the same block, with the block's own mask and rotary embedding.

        :return: what the model's own pass goes on with in the place of `after`, if not
            with that; of a sweep with one passenger
        """
        return None

    def finish(self, batch: Batch, tail: "Tail") -> None:
        """All blocks have run; `tail` turns hidden states into logits."""

    def close(self) -> None:
        """The sweep is over, perhaps by an error: leave no hook behind."""


class Tail:
    """
    Everything behind the last block: final norm, head, and whatever scaling or
    capping of logits the architecture adds. It runs the model itself with its blocks
    replaced by one that hands over the given hidden state, so nothing about the
    architecture has to be known.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[Module], head: "_Head"
    ) -> None:
        self._model, self._blocks, self._head = model, blocks, head
        self.tuple_length = 0  # of what the blocks return; 0: a tensor
        self.chunk_bytes = CHUNK_BYTES
        self.vocabulary: int = model.config.get_text_config().vocab_size

    def logits(
        self, input_ids: torch.Tensor, hidden: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        """
        :param input_ids: (batch, tokens), only its shape counts
        :param hidden: output of the last block, (batch, tokens, hidden)
        :return: float32 logits of tokens start … stop-1, (batch, stop - start, vocab)
        """
        part = hidden[:, start:stop]
        # some models unpack what their blocks return, attention weights included
        rest = (None,) * (self.tuple_length - 1)
        output = (part, *rest) if self.tuple_length else part
        with ExitStack() as stack:
            stack.enter_context(self._head.enabled())
            for block in self._blocks:
                stack.enter_context(
                    replaced_forward(block, lambda *args, **kwargs: output)
                )
            return self._model(input_ids=input_ids[:, start:stop]).logits.float()


class _Head:
    """The output head, whose forward calibration contexts switch off."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._module: Module | None = model.get_output_embeddings()
        if self._module is not None:
            self._forward = self._module.forward

    @contextmanager
    def enabled(self) -> Iterator[None]:
        if self._module is None:
            yield
        else:
            with replaced_forward(self._module, self._forward):
                yield


@contextmanager
def replaced_forward(module: Module, forward: Callable) -> Iterator[None]:
    """Within the context `module` computes `forward`; hooks still fire."""
    missing = object()
    original = module.__dict__.get("forward", missing)
    try:
        module.forward = forward
        yield
    finally:
        if original is missing:
            module.__dict__.pop("forward", None)
        else:
            module.forward = original


def sweep(
    model: PreTrainedModel,
    blocks: Sequence[Module],
    names: Sequence[str],
    batches: Iterable[Batch],
    passengers: Sequence[Passenger],
    *,
    memory: int | None = None,
    description: str = "Sweeping",
) -> None:
    """
    Run the model over the batches with passengers on board.

    :param model: the model; its weights are not touched
    :param blocks: all decoder blocks, in the order in which they run
    :param names: their names, for messages
    :param batches: calibration batches; cut to fewer samples where the sweep would
        take more than `memory`
    :param passengers: what rides along
    :param memory: limit in bytes of what the sweep may take beside the model; None
        for no limit. What cannot be cut to it goes on with a warning
    :param description: label of the progress bar
    :raises NonFiniteHiddenState: naming the first block with NaN or infinity
    """
    head = _Head(model)
    tail = Tail(model, blocks, head)
    with ExitStack() as stack:
        stack.enter_context(calibrating(model))
        ride = _Ride(blocks, names, passengers, tail)
        stack.push(ride)  # before it begins: an interrupt may come in between
        ride.__enter__()
        need = footprint(model, blocks, passengers, memory)
        undivided = any(passenger.undivided for passenger in passengers)
        tail.chunk_bytes = need.chunk
        for batch in tqdm(
            list(_within_memory(batches, need, memory, undivided)),
            desc=description,
            disable=not distributed.is_first(),
        ):
            device = get_execution_device(model)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            for passenger in passengers:
                passenger.start(batch)
            with ride.active():
                model(**batch)
            for passenger in passengers:
                passenger.finish(batch, tail)


def _within_memory(
    batches: Iterable[Batch], need: Footprint, memory: int | None, undivided: bool
) -> Iterator[dict]:
    for batch in batches:
        samples, tokens = batch["input_ids"].shape
        if memory is not None:
            if not undivided:
                samples = min(samples, need.samples(tokens, memory))
            most = need.fixed + samples * need.sample(tokens)
            if most > memory:
                _warn_of_memory(memory, most, need.fixed, samples, tokens)
        yield from split_samples([batch], samples)


@cache
def _warn_of_memory(
    memory: int, most: int, fixed: int, samples: int, tokens: int
) -> None:
    """Once for each case, not once per batch."""
    logger.warning(
        f"sweep_memory is {memory / 2**30:.3g} GiB, but the sweep takes up to "
        f"{most / 2**30:.3g} GiB beside the model: {fixed / 2**30:.3g} GiB for the "
        f"masks of one block and the logits, the rest for {samples} x {tokens} tokens. "
        "Going on; if memory runs out use fewer probe_tokens or max_seq_length, or "
        "a device with more"
    )


class _Ride:
    """The hooks on the blocks, as a context manager that leaves none behind."""

    def __init__(
        self,
        blocks: Sequence[Module],
        names: Sequence[str],
        passengers: Sequence[Passenger],
        tail: Tail,
    ) -> None:
        self._blocks, self._names = blocks, names
        self._passengers, self._tail = passengers, tail
        self._hooks = ExitStack()
        self._onloaded = ExitStack()
        self._listening = False

    def __enter__(self) -> "_Ride":
        for index, block in enumerate(self._blocks):
            enter, leave = self._enter(index), self._leave(index)
            # Not HooksMixin.register_hook: those are asleep while we calibrate.
            add_enter, add_leave = (
                partial(block.register_forward_pre_hook, enter, with_kwargs=True),
                partial(block.register_forward_hook, leave, with_kwargs=True),
            )
            # Both steps in one line: between two lines an interrupt may come.
            self._hooks.callback(add_enter().remove)
            self._hooks.callback(add_leave().remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()
        self._onloaded.close()
        for passenger in self._passengers:
            passenger.close()

    @contextmanager
    def active(self) -> Iterator[None]:
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def _enter(self, index: int) -> Callable:
        def hook(block: Module, args: tuple, kwargs: dict) -> None:
            if not self._listening:
                return
            # from here to the end of _leave the block is onloaded once
            self._onloaded.enter_context(disable_offloading())
            for passenger in self._passengers:
                passenger.enter(index, block)

        return hook

    def _leave(self, index: int) -> Callable:
        def hook(block: Module, args: tuple, kwargs: dict, output: object) -> object:
            if not self._listening:
                return None
            before = args[0] if args else kwargs["hidden_states"]
            after = _hidden_state(output)
            self._tail.tuple_length = len(output) if isinstance(output, tuple) else 0
            if after.dim() != 3:
                raise ValueError(
                    f"block {self._names[index]} puts out a hidden state of shape "
                    f"{tuple(after.shape)}, not (batch, tokens, hidden): architectures "
                    "with several parallel streams, as Gemma 3n, are not supported"
                )
            if not torch.isfinite(after).all():
                raise NonFiniteHiddenState(
                    f"block {self._names[index]} puts out NaN or infinity on the "
                    "calibration text: check the weights and the dtype (float16 "
                    "overflows in some models, use bfloat16)"
                )

            run = RunBlock(block, args, kwargs)
            self._listening = False
            onward: torch.Tensor | None = None
            try:
                for passenger in self._passengers:
                    onward = passenger.leave(index, before, after, run)
            finally:
                self._listening = True
            self._onloaded.close()
            if onward is None or not isinstance(output, tuple):
                return onward
            return (onward, *output[1:])

        return hook


def _hidden_state(output: object) -> torch.Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden
