"""
What a forward with probes takes beside the model, in bytes, so that batches can be cut
to a limit; and the limit, where the machine is to say it.

The figures are upper bounds from the tensors that are alive at once, checked against
the live tensors of real runs in tests/forward/test_memory.py and against the resident
memory of a process in integration/benchmarks/memory.py.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import psutil
import torch
from compressed_tensors.offload import get_execution_device
from torch.nn import Linear, Module
from transformers import PreTrainedModel

from absorb_plugin import distributed
from absorb_plugin.cpu import bfloat16_is_slow
from absorb_plugin.devices import computes_on_cpu, dtype_of, free_memory, launches
from absorb_plugin.forward import chunks
from absorb_plugin.forward import head as output_head
from absorb_plugin.forward.probe import Needs

__all__ = ["Footprint", "block_bytes", "footprint", "limit_by_machine"]

# Alive with a chunk: logits in the model's dtype and in float32, their log-softmax, and
# the gradients of these.
CHUNK_COPIES = 5
# Share of the limit that a chunk may take.
CHUNK_SHARE = 16
# Alive with a chunk of a Linear's scores: weight and product in float32, ranked copy;
# or two weights, their difference and its quotient. An accelerator's sort gives ranks
# of 64 bits beside the scores, and has a copy of both.
SCORE_COPIES = 5
SORTED_COPIES = 9
# Matrices d × d in float32 beside what was observed: its dampened copy, turned round,
# the factor, and that turned back.
FACTOR_COPIES = 3
# Columns of SparseGPT of which one of 2 ** PATTERN patterns is pruned, how many columns
# are tabled at a time, and what a table has per column, five times while it is made.
PATTERN, TABLED = 8, 128
TABLE = 5 * 4 * PATTERN * 2**PATTERN

# "auto": this share of what is free, rounded down to a power of two, within bounds. On
# an accelerator every batch onloads the model anew, so more memory is less traffic;
# what is left is for blocks that stay (resident.py).
SHARE = 0.5
LEAST = 2**30
MOST = 32 * 2**30
MOST_ON_CPU = 4 * 2**30


@dataclass(frozen=True)
class Footprint:
    """
    :param fixed: whatever the batch: pruned weights, Hessians, a chunk of logits
    :param chunk: float32 logits at a time
    :param per_state: of every token of a batch: hidden states
    :param per_token: of every token in the block that runs
    :param per_pair: of every pair of tokens of a sample: attention scores
    """

    fixed: int
    chunk: int
    per_state: int
    per_token: int
    per_pair: int

    def sample(self, tokens: int) -> int:
        """Bytes for one sample of so many tokens, beside `fixed`."""
        return self.per_state * tokens + self.inside(tokens)

    def inside(self, tokens: int) -> int:
        """Of these what it takes while a block runs it."""
        return self.per_token * tokens + self.per_pair * tokens**2

    def left(self, samples: int, tokens: int, memory: int) -> int:
        """Of the limit, beside a batch of so many samples that a block runs at once."""
        return max(0, memory - self.whole(samples, tokens, samples))

    def whole(self, samples: int, tokens: int, at_a_time: int = 1) -> int:
        """Of samples that are all kept, while a block runs so many of them."""
        states = samples * tokens * self.per_state
        return self.fixed + states + at_a_time * self.inside(tokens)

    def part(self, samples: int, tokens: int, memory: int) -> int:
        """
        How many of so many samples a block may run at a time, if all are kept. Where
        the limit is passed whatever the number, they may take a quarter of it beyond:
        each part adds a matrix to every Hessian of the block.
        """
        room = memory - self.fixed - samples * tokens * self.per_state
        if room < self.inside(tokens):
            room = max(room, memory // 4)
        return min(samples, max(1, room // self.inside(tokens)))

    def kept_samples(self, tokens: int, memory: int) -> int:
        """How many can be kept while a block runs one of them, at least one."""
        room = memory - self.fixed - self.inside(tokens)
        return max(1, room // (tokens * self.per_state))

    def samples(self, tokens: int, memory: int) -> int:
        """
        How many samples of so many tokens fit `memory` at a time, at least one. Where
        `fixed` alone passes the limit, fewer samples would not help, and each batch
        onloads the model again: then they may take a quarter of the limit beyond it.
        """
        room = memory - self.fixed if self.fixed < memory else memory // 4
        return max(1, room // self.sample(tokens))


@dataclass(frozen=True)
class _Shapes:
    """
    The Linears of the blocks.

    :param linears: (out_features, in_features), of every block
    :param sharing: of every block those that may share an input: under one parent, and
        of equal in_features
    """

    linears: list[list[tuple[int, int]]]
    sharing: list[list[list[tuple[int, int]]]]

    @classmethod
    def of(cls, blocks: Sequence[Module]) -> "_Shapes":
        linears, sharing = [], []
        for block in blocks:
            groups = defaultdict(list)
            for name, module in block.named_modules():
                if isinstance(module, Linear):
                    # not of the weight: reading it may onload it
                    shape = (module.out_features, module.in_features)
                    groups[name.rpartition(".")[0], module.in_features].append(shape)
            sharing.append(list(groups.values()))
            linears.append([shape for group in groups.values() for shape in group])
        return cls(linears, sharing)

    @property
    def total(self) -> int:
        return sum(map(_weights, self.linears))

    @property
    def rows(self) -> int:
        return sum(rows for block in self.linears for rows, _ in block)

    @property
    def columns(self) -> int:
        return sum(columns for block in self.linears for _, columns in block)

    @property
    def block(self) -> int:
        """Weights of the largest block."""
        return max(map(_weights, self.linears), default=0)

    @property
    def linear(self) -> int:
        """Weights of the largest Linear."""
        return max((r * c for block in self.linears for r, c in block), default=0)

    @property
    def input(self) -> int:
        """Features of the widest input."""
        return max((c for block in self.linears for _, c in block), default=0)

    @property
    def widest(self) -> int:
        """Features of the widest input or output."""
        return max((max(shape) for block in self.linears for shape in block), default=0)

    @property
    def widths(self) -> int:
        """All that the Linears of one block read and write."""
        return max((sum(map(sum, block)) for block in self.linears), default=0)


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
    element = dtype_of(model).itemsize
    heads = getattr(config, "num_attention_heads", None) or 1
    if not isinstance(heads, int):  # of every block its own
        heads = max(heads)
    shapes, need = _Shapes.of(blocks), reduce(or_, needs, Needs())
    chunk = output_head.CHUNK_BYTES if memory is None else max(1, memory // CHUNK_SHARE)
    chunk = min(output_head.CHUNK_BYTES, chunk)
    fixed = (
        max(_pruning(model, shapes, element, need), CHUNK_COPIES * chunk)
        + _thresholds(shapes, need)
        + (4 * shapes.columns if need.sums else 0)
        + _kept(model, shapes, element, need)
        + _float32_block(shapes, element, need)
        + _float32_copies(model, shapes, need)
    )
    # what enters and leaves the block, and that in parts until they are joined
    states = 3 + need.trajectories
    # remote code calls it as it likes
    hidden = getattr(config, "hidden_size", None) or model.get_input_embeddings()
    hidden = hidden if isinstance(hidden, int) else hidden.embedding_dim
    return Footprint(
        fixed,
        chunk,
        element * hidden * states,
        _inside(hidden, shapes, element, need),
        (24 if need.backward else 12) * heads,
    )


def block_bytes(model: PreTrainedModel, blocks: Sequence[Module]) -> int:
    """Of the Linears' weights of the largest block."""
    return dtype_of(model).itemsize * _Shapes.of(blocks).block


def limit_by_machine(model: PreTrainedModel, blocks: Sequence[Module]) -> int:
    """
    `probe_memory: auto`, in bytes: half of what is free where the model computes, and
    on an accelerator not taken by the block that is onloaded, rounded down to a power
    of two; 1 GiB at least, and 32 GiB at most (4 on a CPU).
    """
    device = torch.device(get_execution_device(model))
    if device.type == "cpu":
        return _power_of_two(psutil.virtual_memory().available * SHARE, MOST_ON_CPU)
    free = free_memory(device)
    if free is None:
        return MOST_ON_CPU
    return _power_of_two((free - block_bytes(model, blocks)) * SHARE, MOST)


def _power_of_two(memory: float, most: int) -> int:
    """Rounded down, so that a run that is repeated splits its batches alike."""
    return int(2 ** (int(min(max(memory, LEAST), most)).bit_length() - 1))


def _inside(hidden: int, shapes: _Shapes, element: int, need: Needs) -> int:
    """Per token, of the block that runs: norms and the noise probe are in float32."""
    inside = 10 * 4 * hidden
    if need.backward:  # what every Linear reads and writes is kept
        inside += 3 * element * shapes.widths + 3 * 4 * shapes.widest
    else:  # gate, up, activation, product
        inside += 4 * element * shapes.widest
    if need.hessians:  # an input without padding, and that in float32
        inside += (element + 4) * shapes.input
    return inside


def _pruning(model: PreTrainedModel, shapes: _Shapes, element: int, need: Needs) -> int:
    """
    One Linear at a time, but the pruner's own weights, and those that the ranks put
    together, a block at a time.
    """
    if not need.pruned:
        return 0
    copies = 3 if need.backward else 1  # both sides of a band, and their difference
    scores = SCORE_COPIES if computes_on_cpu(model) else SORTED_COPIES
    scores *= min(chunks.CHUNK_BYTES, 4 * shapes.linear)
    pruning = copies * element * shapes.linear + scores
    pruning += need.joined * element * shapes.block
    if need.single_batch:
        pruning += _at_once(need) * element * shapes.block
    if not need.hessians:
        return pruning
    tables = launches(torch.device(get_execution_device(model)))
    return pruning + _hessians(shapes, element, need, tables)


def _hessians(shapes: _Shapes, element: int, need: Needs, tables: bool) -> int:
    """
    All of a block; then one is factored, and the columns of a group are walked.

    :param tables: whether by patterns of columns, as on an accelerator
    """
    observed = max(
        (sum(group[0][1] ** 2 for group in block) for block in shapes.sharing),
        default=0,
    )
    group = max(
        (_weights(group) for block in shapes.sharing for group in block), default=0
    )
    square, sets = 4 * shapes.input**2, max(1, need.sets)
    factoring = (FACTOR_COPIES + sets - 1) * square
    walk = _at_once(need) * group * (3 * 4 + element)
    walk += tables * sets * TABLE * min(TABLED, shapes.input)
    return sets * 4 * observed + max(factoring, sets * square + walk)


def _at_once(need: Needs) -> int:
    """Pruned copies of a weight that are made at once."""
    return max(1, need.kept_weights, need.sets)


def _thresholds(shapes: _Shapes, need: Needs) -> int:
    return 0 if need.single_batch else 4 * need.pruned * shapes.rows


def _kept(model: PreTrainedModel, shapes: _Shapes, element: int, need: Needs) -> int:
    """
    Pruned copies of the model: on a CPU all; on an accelerator those of the block that
    runs, packed, for the others lie on the host or in what is spare.
    """
    weights = shapes.block if need.backward else 0
    if computes_on_cpu(model):
        weights = shapes.total
    shares = distributed.ranks() if need.joined else 1
    return need.kept_weights * element * -(-weights // shares)


def _float32_block(shapes: _Shapes, element: int, need: Needs) -> int:
    """One block in float32, beside its weights in 16 bits."""
    return 4 * shapes.block if need.float32 and element < 4 else 0


def _float32_copies(model: PreTrainedModel, shapes: _Shapes, need: Needs) -> int:
    """Of weights, where products of bfloat16 run in float32 (cpu.py)."""
    if dtype_of(model) != torch.bfloat16 or not bfloat16_is_slow():
        return 0
    head = model.get_output_embeddings()
    size = head.in_features * head.out_features if isinstance(head, Linear) else 0
    return 4 * max(size, shapes.block if need.backward else shapes.linear)


def _weights(linears: Sequence[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in linears)
