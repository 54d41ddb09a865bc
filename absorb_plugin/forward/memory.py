"""
What a forward with probes takes beside the model, in bytes, so that batches can be cut
to a limit.

The figures are upper bounds from the tensors that are alive at once, checked against
the live tensors of real runs in tests/forward/test_memory.py and against the resident
memory of a process in integration/benchmarks/memory.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch.nn import Linear, Module
from transformers import PreTrainedModel

from absorb_plugin.cpu import bfloat16_is_slow
from absorb_plugin.forward import head as output_head
from absorb_plugin.forward.probe import Needs

__all__ = ["Footprint", "footprint"]

# Alive with a chunk: logits in the model's dtype and in float32, their log-softmax, and
# the gradients of these.
CHUNK_COPIES = 5
# Share of the limit that a chunk may take.
CHUNK_SHARE = 16


@dataclass(frozen=True)
class Footprint:
    """
    :param fixed: whatever the batch: masks of one block, a chunk of logits
    :param chunk: float32 logits at a time
    :param per_token: of every token of a batch
    :param per_pair: of every pair of tokens of a sample: attention scores
    """

    fixed: int
    chunk: int
    per_token: int
    per_pair: int

    def sample(self, tokens: int) -> int:
        """Bytes for one sample of so many tokens, beside `fixed`."""
        return self.per_token * tokens + self.per_pair * tokens**2

    def samples(self, tokens: int, memory: int) -> int:
        """
        How many samples of so many tokens fit `memory` at a time, at least one. Where
        `fixed` alone passes the limit, fewer samples would not help, and each batch
        onloads the model again: then they may take a quarter of the limit beyond it.
        """
        room = memory - self.fixed if self.fixed < memory else memory // 4
        return max(1, room // self.sample(tokens))


def footprint(
    model: PreTrainedModel,
    blocks: Sequence[Module],
    needs: Sequence[Needs],
    memory: int | None,
) -> Footprint:
    """
    :param blocks: the decoder blocks
    :param needs: of every probe
    :param memory: the limit in bytes, or None
    """
    config = model.config.get_text_config()
    element = torch.finfo(model.dtype).bits // 8
    heads = getattr(config, "num_attention_heads", None) or 1
    linears = [
        [m for m in block.modules() if isinstance(m, Linear)] for block in blocks
    ]
    need = reduce(or_, needs, Needs())
    backward = need.backward
    states = 2 + need.trajectories
    # of the block that runs: norms and the noise probe work in float32
    inside = 10 * 4 * config.hidden_size
    if backward:  # what every Linear reads and writes is kept
        inside += 3 * element * max(map(_widths, linears), default=0)
    else:  # gate, up, activation, product
        inside += 4 * element * max(map(_widest, linears), default=0)
    if need.hessians:
        # inputs of all Linears of a block are kept, and widened one at a time
        inside += element * max(map(_entering, linears), default=0)
        inside += 4 * max(map(_widest, linears), default=0)
    chunk = output_head.CHUNK_BYTES if memory is None else max(1, memory // CHUNK_SHARE)
    chunk = min(output_head.CHUNK_BYTES, chunk)
    weights = max(map(_weights, linears), default=0)
    return Footprint(
        max(_masks(weights, element, need), CHUNK_COPIES * chunk)
        + _float32_block(weights, element, need)
        + _hessians(linears, need)
        + _float32_copies(model, linears, backward),
        chunk,
        element * config.hidden_size * states + inside,
        (24 if backward else 12) * heads,
    )


def _masks(weights: int, element: int, need: Needs) -> int:
    """Scores and their order in float32, weights masked twice, gradients."""
    if not need.pruned:
        return 0
    return weights * (8 + 2 * element + (5 if need.backward else 2))


def _float32_block(weights: int, element: int, need: Needs) -> int:
    """One block in float32, beside its weights in 16 bits."""
    return 4 * weights if need.float32 and element < 4 else 0


def _hessians(linears: Sequence[Sequence[Linear]], need: Needs) -> int:
    """One at a time, in float32: itself, its factor, the inverse of that."""
    if not need.hessians:
        return 0
    widest = max((x.in_features for block in linears for x in block), default=0)
    return 3 * 4 * widest**2


def _float32_copies(
    model: PreTrainedModel, linears: Sequence[Sequence[Linear]], backward: bool
) -> int:
    """Of weights, where products of bfloat16 run in float32 (cpu.py)."""
    if model.dtype != torch.bfloat16 or not bfloat16_is_slow():
        return 0
    head = model.get_output_embeddings()
    size = _weights([head]) if isinstance(head, Linear) else 0
    one = max((_weights([linear]) for block in linears for linear in block), default=0)
    kept = max(map(_weights, linears), default=0) if backward else one
    return 4 * max(size, kept)


def _weights(linears: Sequence[Linear]) -> int:
    # not weight.numel(): reading a weight may onload it
    return sum(linear.in_features * linear.out_features for linear in linears)


def _entering(linears: Sequence[Linear]) -> int:
    return sum(linear.in_features for linear in linears)


def _widths(linears: Sequence[Linear]) -> int:
    return sum(linear.in_features + linear.out_features for linear in linears)


def _widest(linears: Sequence[Linear]) -> int:
    return max((max(x.in_features, x.out_features) for x in linears), default=0)
