"""Which decoder blocks a model has, which Linears in them, and how many weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

__all__ = ["Block", "BlockMap", "find_blocks", "linear_parameters"]


@dataclass(frozen=True)
class Block:
    """
    One decoder block.

    :param name: full module name, e.g. "model.layers.0"
    :param module: the block
    :param linears: name relative to the block -> Linear, in module order: those that
        will be pruned, so possibly none
    """

    name: str
    module: torch.nn.Module
    linears: Mapping[str, torch.nn.Linear] = field(default_factory=dict)

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
                )
                for block in self.blocks
            )
        )


def linear_parameters(linear: torch.nn.Linear) -> int:
    """Number of weights of a Linear."""
    # not weight.numel(): reading a weight may onload it
    return linear.in_features * linear.out_features


def find_blocks(
    model: PreTrainedModel, block_classes: str | Iterable[str] | None = None
) -> BlockMap:
    """
    Find the decoder blocks: the ModuleList with the most Linear weights among those
    of the text decoder whose members are of the classes that may not be split.

    :param model: a decoder-only language model, or one whose `get_decoder()` is
    :param block_classes: class names of the blocks; default: those that transformers
        lists in `_no_split_modules`
    :raises ValueError: for encoder-decoder models, or if no block with a Linear is
        found
    """
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{kind} is an encoder-decoder model: absorption is defined for the single "
            "chain of blocks of a decoder-only language model"
        )
    if block_classes is None:
        block_classes = getattr(model, "_no_split_modules", None) or ()
    if isinstance(block_classes, str):
        block_classes = [block_classes]
    classes = set(block_classes)

    decoder = model.get_decoder() or model
    names = {module: name for name, module in model.named_modules()}
    candidates = []
    for stack in decoder.modules():
        if not isinstance(stack, torch.nn.ModuleList) or not len(stack):
            continue
        if not all(classes & {c.__name__ for c in type(m).__mro__} for m in stack):
            continue
        candidates.append(
            BlockMap(tuple(Block(names[m], m, _linears(m)) for m in stack))
        )
    if not candidates:
        raise ValueError(
            f"no decoder block found in {kind}: no ModuleList holds modules of class "
            f"{sorted(classes) or '(none named by the model)'}. Name the block class "
            "with oneshot(sequential_targets=[...])"
        )
    best = max(candidates, key=lambda found: sum(b.parameters for b in found.blocks))
    if not best.prunable:
        raise ValueError(
            f"the blocks of {kind} ({best.blocks[0].name} …) hold no torch.nn.Linear. "
            "llm-compressor's pruners handle Linears; GPT-2 style Conv1D weights are "
            "not supported"
        )
    return best


def _linears(block: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
