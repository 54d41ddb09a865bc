"""Which decoder blocks a model has, which Linears in them, and how many weights."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from loguru import logger
from transformers import PreTrainedModel

from absorb_plugin.language_model import language_model
from absorb_plugin.torch_state import stored

__all__ = ["Block", "BlockMap", "find_blocks", "linear_parameters", "outside"]

# Share of the weights, beyond which it is told that they stay dense.
MUCH = 0.05
# Modules that choose among experts, or what is attended to, by what models of
# transformers call them. No slope reaches the latter, and in texts as short as ours
# they choose all.
ROUTERS = ("router", "routers", "indexer")
ROUTER_CLASS = re.compile(r"(Router|TopKGating|Indexer)(MLP)?$")


@dataclass(frozen=True)
class Block:
    """
    One decoder block.

    :param name: full module name, e.g. "model.layers.0"
    :param module: the block
    :param linears: name relative to the block -> Linear, in module order: those that
        will be pruned, so possibly none
    :param routers: names of the Linears that choose among experts or tokens, never
        pruned
    """

    name: str
    module: torch.nn.Module
    linears: Mapping[str, torch.nn.Linear] = field(default_factory=dict)
    routers: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of prunable weights, p_b."""
        return sum(linear_parameters(linear) for linear in self.linears.values())

    def full_name(self, linear: str) -> str:
        return f"{self.name}.{linear}"


@dataclass(frozen=True)
class BlockMap:
    """
    All decoder blocks in the order in which the hidden state visits them.

    :param blocks: every block, also those without a prunable Linear
    """

    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def modules(self) -> list[torch.nn.Module]:
        return [block.module for block in self.blocks]

    @property
    def prunable(self) -> list[int]:
        """Indices of the blocks that have at least one prunable Linear."""
        return [i for i, block in enumerate(self.blocks) if block.linears]

    @property
    def parameters(self) -> np.ndarray:
        """p_b of the prunable blocks, shape (number of prunable blocks,)."""
        return np.array([self.blocks[i].parameters for i in self.prunable])

    def linears(self) -> dict[str, torch.nn.Linear]:
        """Full name -> prunable Linear, over all blocks in module order."""
        return {
            block.full_name(name): linear
            for block in self.blocks
            for name, linear in block.linears.items()
        }

    def other_weights(self) -> dict[str, float]:
        """
        What of the blocks' weights no Linear holds, and no pruner takes: experts in one
        tensor, convolutions; the share by class of their module. Vectors, as of norms,
        do not count.
        """
        found: Counter[str] = Counter()
        seen: set[torch.Tensor] = set()
        for part in (part for module in self.modules for part in module.modules()):
            linear = isinstance(part, torch.nn.Linear)
            for tensor in stored(part._parameters).values():
                if tensor is not None and tensor.dim() > 1 and tensor not in seen:
                    seen.add(tensor)
                    found["" if linear else type(part).__name__] += tensor.numel()
        return {name: n / found.total() for name, n in found.items() if name}

    @property
    def routers(self) -> frozenset[str]:
        """Full names of the Linears that choose among experts or tokens."""
        return frozenset(
            block.full_name(name) for block in self.blocks for name in block.routers
        )

    def restrict(self, names: Iterable[str]) -> "BlockMap":
        """The same blocks, of whose Linears only those named count as prunable."""
        keep = set(names)
        return BlockMap(
            tuple(
                Block(
                    block.name,
                    block.module,
                    {
                        name: linear
                        for name, linear in block.linears.items()
                        if block.full_name(name) in keep
                    },
                    block.routers,
                )
                for block in self.blocks
            )
        )


def outside(
    model: torch.nn.Module, blocks: Iterable[torch.nn.Module]
) -> list[torch.nn.Module]:
    """Modules of a model that lie in none of its blocks."""
    inside = {module for block in blocks for module in block.modules()}
    return [module for module in model.modules() if module not in inside]


def linear_parameters(linear: torch.nn.Linear) -> int:
    """Number of weights of a Linear."""
    # not weight.numel(): reading a weight may onload it
    return linear.in_features * linear.out_features


def find_blocks(
    model: torch.nn.Module, block_classes: str | Iterable[str] | None = None
) -> BlockMap:
    """
    Find the decoder blocks: the ModuleList of the text decoder with the most Linear
    weights, among those that lie in no block themselves. Lists whose members are of the
    classes that transformers may not split come first.

    :param model: a decoder-only language model, or one whose `get_decoder()` is,
        wrapped or not
    :param block_classes: class names of the blocks, for a model that names none.
        Others, such as other `sequential_targets` of llm-compressor, change nothing
    :raises ValueError: for encoder-decoder models, or if no block with a Linear is
        found
    """
    inner = language_model(model)
    kind = type(inner).__name__
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{kind} is an encoder-decoder model: absorption is defined for the single "
            "chain of blocks of a decoder-only language model"
        )
    own = set(getattr(inner, "_no_split_modules", None) or ())
    given = [block_classes] if isinstance(block_classes, str) else block_classes or ()
    stacks = _outermost(_decoder(inner))
    if not stacks:
        raise ValueError(
            f"no decoder block found in {kind}: no ModuleList of its decoder holds "
            "modules. Blocks must lie in one ModuleList"
        )
    names = {module: name for name, module in model.named_modules()}
    best = max(_preferred(stacks, own, set(given)), key=_linear_weights)
    found = BlockMap(tuple(_blocks(best, names)))
    if not found.prunable:
        raise ValueError(
            f"the blocks of {kind} ({found.blocks[0].name} …) hold no torch.nn.Linear. "
            "llm-compressor's pruners handle Linears; GPT-2 style Conv1D weights are "
            "not supported"
        )
    return found


def _decoder(inner: PreTrainedModel) -> torch.nn.Module:
    """The text decoder; the whole model, where what is called so holds no list."""
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    if decoder is not None and _outermost(decoder):
        return decoder
    return inner


def _outermost(decoder: torch.nn.Module) -> list[torch.nn.ModuleList]:
    """Lists of modules that lie in no member of another list of like modules."""
    found: list[torch.nn.ModuleList] = []
    inside: set[torch.nn.Module] = set()
    for module in decoder.modules():
        if not isinstance(module, torch.nn.ModuleList) or not len(module):
            continue
        if module not in inside and any(map(_has_weights, module)):
            found.append(module)
            inside.update(x for member in module for x in member.modules())
    return found


def _has_weights(module: torch.nn.Module) -> bool:
    # not parameters(): reading a weight may onload it
    return any(len(inner._parameters) for inner in module.modules())


def _preferred(
    stacks: Sequence[torch.nn.ModuleList], own: set[str], given: set[str]
) -> Sequence[torch.nn.ModuleList]:
    """Those of the classes that the model names, else that the user does, else all."""
    for classes in (own, given):
        named = [
            stack
            for stack in stacks
            if all(classes & {c.__name__ for c in type(m).__mro__} for m in stack)
        ]
        if named:
            return named
    return stacks


def _linear_weights(stack: torch.nn.ModuleList) -> int:
    return sum(map(linear_parameters, _linears(stack).values()))


def _blocks(
    stack: torch.nn.ModuleList, names: Mapping[torch.nn.Module, str]
) -> list[Block]:
    """Blocks and their Linears, without routers and what blocks share."""
    counts = Counter(
        _weight(linear) for block in stack for linear in _linears(block).values()
    )
    inside = {module for block in stack for module in block.modules()}
    # the embedding's, or the head's
    counts.update(
        _place(parameter)
        for module in names
        if module not in inside
        for parameter in stored(module._parameters).values()
        if parameter is not None
    )
    blocks, shared = [], set()
    for block in stack:
        routers = _routers(block)
        linears = {}
        for name, linear in _linears(block).items():
            if counts[_weight(linear)] > 1:
                shared.add(f"{names[block]}.{name}")
            elif name not in routers:
                linears[name] = linear
        blocks.append(Block(names[block], block, linears, tuple(routers)))
    made = [name for block in stack for name in _made(block, names[block])]
    if made:
        logger.warning(
            f"{len(made)} Linears have no own weight ({made[0]} …): it is made of "
            "others, by weight_norm or another parametrization. They stay dense. "
            "Fold it first: torch.nn.utils.parametrize.remove_parametrizations, or "
            "remove_weight_norm"
        )
    if shared:
        logger.warning(
            f"{len(shared)} Linears share their weight with another and stay dense, "
            f"for it cannot have the sparsity of each: {sorted(shared)[0]} …"
        )
    return blocks


def _linears(block: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear) and _has_own_weight(module)
    }


def _made(block: torch.nn.Module, prefix: str) -> Iterator[str]:
    """Full names of Linears whose weight is computed of other parameters."""
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear) and not _has_own_weight(module):
            yield f"{prefix}.{name}"


def _has_own_weight(linear: torch.nn.Linear) -> bool:
    return "weight" in stored(linear._parameters)


def _weight(linear: torch.nn.Linear) -> tuple[int, int]:
    """Tells weights apart without reading them, which may onload."""
    return _place(stored(linear._parameters)["weight"])


def _place(parameter: torch.Tensor) -> tuple[int, int]:
    """Where its numbers lie, which parameters may share; they are not read."""
    return parameter.untyped_storage()._cdata, int(parameter.storage_offset())


def _routers(block: torch.nn.Module) -> list[str]:
    """Of a block's Linears those that choose among experts or weigh a shared one."""
    linears = _linears(block)
    found = {*_beside_experts(block), *_in_routers(block)}
    return [name for name in linears if name in found]


def _beside_experts(block: torch.nn.Module) -> Iterator[str]:
    """
    Routers by their place and shape, for their names differ from model to model: beside
    a list of experts, with one output per expert, or with one output. Where the experts
    lie directly in the block, beside its attention, the name counts.
    """
    for parent, module in block.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, torch.nn.Module):
            continue
        sizes = {1, *_number_of_experts(experts)}
        yield from (
            f"{parent}.{name}".removeprefix(".")
            for name, linear in _linears(module).items()
            if linear.out_features in sizes
            and not name.startswith("experts.")
            and (parent or "router" in name or "gate" in name)
        )


def _in_routers(block: torch.nn.Module) -> Iterator[str]:
    """
    Routers that name or class say are some: of several layers, with more outputs than
    experts, of experts that are fused in other ways. What holds most of the block's
    weights is none, whatever it is called.
    """
    whole = sum(map(linear_parameters, _linears(block).values()))
    for parent, module in block.named_modules():
        named = parent.rpartition(".")[2] in ROUTERS
        if not parent or not (named or ROUTER_CLASS.search(type(module).__name__)):
            continue
        if sum(map(linear_parameters, _linears(module).values())) <= whole / 2:
            yield from (f"{parent}.{name}".rstrip(".") for name in _linears(module))


def _number_of_experts(experts: torch.nn.Module) -> set[int]:
    # a list of experts may hold their activation function as well
    counted = sum(1 for expert in experts.children() if _linears(expert))
    stated = getattr(experts, "num_experts", None)  # fused in one weight
    return {counted, stated} if isinstance(stated, int) else {counted}
