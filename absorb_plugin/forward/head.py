"""Everything after the last block: final norm, output head, scaling of logits."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from absorb_plugin.forward.block_io import put_hidden_state
from absorb_plugin.forward.replaced import replaced_forward, without_hooks
from absorb_plugin.language_model import REMEDY, forward_inputs

# How configurations call the ids that stand for images and sounds.
MEDIA_TOKEN = re.compile(r"(image|video|audio|vision)(_pad)?_token_(id|index)$")

__all__ = ["CHUNK_BYTES", "OutputHead"]

# Logits of one chunk, in float32; at a vocabulary of 128k that is 512 tokens.
CHUNK_BYTES = 256 * 2**20


class OutputHead:
    """
    Everything after the last block: final norm, head, and whatever scaling or capping
    of logits the architecture adds. It runs the model itself with its blocks replaced
    by one that returns the given hidden state, so nothing about the architecture has
    to be known.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Module]) -> None:
        self._model, self._blocks = model, blocks
        self._linear: Module | None = model.get_output_embeddings()
        # calibration contexts switch the head's forward off
        self._forward = None if self._linear is None else self._linear.forward
        # what the last block returned, without its contents
        self.output: Any = torch.empty(0)
        # logits of the model's own pass, (batch, tokens, vocab); of `run_with` alone
        self.own: torch.Tensor | None = None
        self.placeholders = placeholders(model)
        self.chunk_bytes = CHUNK_BYTES
        known = getattr(model.config.get_text_config(), "vocab_size", None)
        self.vocabulary: int = known or model.get_input_embeddings().num_embeddings

    def run_with(self, batch: Mapping[str, torch.Tensor]) -> None:
        """The model's own pass, its head included; `own` is what that returned."""
        self.own = None
        with self._enabled():
            found = self._model(**forward_inputs(self._model, batch))
        with suppress(ValueError):  # of a model without logits, which `logits` says
            self.own = self._logits(found)

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
        output = put_hidden_state(self.output, part)
        with ExitStack() as stack:
            stack.enter_context(self._enabled())
            for block in self._blocks:
                stack.enter_context(without_hooks(block))
                stack.enter_context(replaced_forward(block, _constant(output)))
            inputs = {"input_ids": input_ids[:, start:stop]}
            found = self._model(**forward_inputs(self._model, inputs))
        return self._logits(found).float()

    def _logits(self, output: Any) -> torch.Tensor:
        """What the model returned: an output with logits, a mapping, a tuple."""
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, Mapping):
            found = output.get("logits")
        if isinstance(output, tuple | list):
            found = next((x for x in output if isinstance(x, torch.Tensor)), None)
        if isinstance(output, torch.Tensor):
            found = output
        if found is None or found.dim() != 3:
            raise ValueError(
                f"model: {type(self._model).__name__} returns no logits of shape "
                "(batch, tokens, vocabulary), so there is no next-token loss to judge "
                f"by. {REMEDY}"
            )
        return found

    @contextmanager
    def _enabled(self) -> Iterator[None]:
        if self._linear is None or self._forward is None:
            yield
        else:
            with replaced_forward(self._linear, self._forward):
                yield


def placeholders(model: PreTrainedModel) -> list[int]:
    """Ids that stand for images or sounds, which no model is made to predict."""
    configs = (model.config, model.config.get_text_config())
    found = {
        value
        for config in configs
        for name, value in vars(config).items()
        if MEDIA_TOKEN.match(name) and isinstance(value, int)
    }
    return sorted(found)


def _constant(output: object) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
