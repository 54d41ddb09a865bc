"""
Blocks that take a batch a few samples at a time, where all of it must have passed a
block before the next one runs: the memory of a running block is that of a part.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass
from functools import partial, update_wrapper
from typing import Any

import torch
from torch.nn import Module

from absorb_plugin.forward.block_io import (
    BlockCall,
    hidden_state,
    put_hidden_state,
)
from absorb_plugin.forward.replaced import replaced_forward

__all__ = ["Parts", "current_part"]

_PART: ContextVar[slice] = ContextVar("part", default=slice(None))


def current_part() -> slice:
    """Which samples of the batch a block is running; all of them outside `Parts`."""
    return _PART.get()


class Parts:
    """:param size: samples at a time; 0 for all"""

    def __init__(self, size: int = 0) -> None:
        self.size = size
        # so many first samples of a batch do not run together with the others
        self.apart = 0

    @contextmanager
    def applied(self, blocks: Sequence[Module]) -> Iterator[None]:
        """Within the context the blocks run in parts, whoever calls them."""
        with ExitStack() as stack:
            for block in blocks:
                forward = partial(self._run, block, block.forward)
                # its parameters' names tell what an argument is
                update_wrapper(forward, block.forward)
                stack.enter_context(replaced_forward(block, forward))
            yield

    def _run(self, block: Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        call = BlockCall.of(block, args, kwargs)
        parts = self._of(len(call.hidden))
        if len(parts) == 1:
            return forward(*args, **kwargs)
        outputs = []
        for part in parts:
            token = _PART.set(part)
            try:
                own = call.of_samples(part, block)
                outputs.append(forward(*own.args, **own.kwargs))
            finally:
                _PART.reset(token)
        return _joined(outputs)

    def _of(self, samples: int) -> list[slice]:
        size, found = self.size or samples, []
        apart = min(self.apart, samples)
        for first, last in ((0, apart), (apart, samples)):
            found += [
                slice(start, min(start + size, last))
                for start in range(first, last, size)
            ]
        return found


def _joined(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, tuple):
        joined = [_joined(values) for values in zip(*outputs, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    if not isinstance(first, Mapping | list) and not is_dataclass(first):
        return first
    hidden = torch.cat([hidden_state(output) for output in outputs])
    return put_hidden_state(first, hidden)
