"""What llm-compressor's own functions make of a Linear, and of a model in its order."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify
from torch.nn import Linear
from transformers import PreTrainedModel

from absorb_plugin.blocks import BlockMap
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.pruners import Pruner, SparseGPT, Wanda

# weight, sparsity, inputs -> pruned weight
Prune = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]


def as_upstream(pruner: Pruner) -> Prune:
    """llm-compressor's function, with the pruner's settings."""
    if isinstance(pruner, SparseGPT):
        return partial(sparsegpt, pruner)
    assert isinstance(pruner, Wanda)
    return wanda


def sparsegpt(
    settings: SparseGPT, weight: torch.Tensor, sparsity: float, inputs: torch.Tensor
) -> torch.Tensor:
    linear, inputs = _linear(weight), inputs.float()
    hessian = {linear: 2 / 3 * inputs.t() @ inputs}  # any scale
    return sgpt_sparsify.sparsify_weight(
        linear,
        hessian,
        sparsity,
        0,
        0,
        settings.block_size,
        settings.dampening,
        settings.preserve,
    )[1]


def wanda(weight: torch.Tensor, sparsity: float, inputs: torch.Tensor) -> torch.Tensor:
    linear = _linear(weight)
    sums = {linear: inputs.float().square().sum(0) / 3}  # any scale
    return wanda_sparsify.sparsify_weight(linear, sums, sparsity, 0, 0)


@torch.no_grad()
def pruned_copy(
    model: PreTrainedModel,
    blocks: BlockMap,
    sparsities: Mapping[str, float],
    batch: Batch,
    prune: Prune,
) -> PreTrainedModel:
    """A copy pruned block by block, its Linears watched in whole forwards."""
    pruned = copy.deepcopy(model)
    for block in blocks.blocks:
        names = [block.full_name(name) for name in block.linears]
        for name, inputs in inputs_of(pruned, names, batch).items():
            weight = pruned.get_submodule(name).weight
            weight.copy_(prune(weight, sparsities[name], inputs))
    return pruned


@torch.no_grad()
def inputs_of(
    model: PreTrainedModel, names: list[str], batch: Batch
) -> dict[str, torch.Tensor]:
    """Full name of a Linear -> what enters it, (tokens, in_features), no padding."""
    found: dict[str, torch.Tensor] = {}
    kept = token_mask(batch).flatten()

    def keep(name: str, module: Linear, args: tuple) -> None:
        found[name] = args[0].flatten(0, -2)[kept]

    with _hooked(model, {name: partial(keep, name) for name in names}):
        model(**batch, use_cache=False)
    return found


@contextmanager
def _hooked(model: PreTrainedModel, hooks: Mapping[str, Callable]) -> Iterator[None]:
    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook)
        for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear(weight: torch.Tensor) -> Linear:
    linear = Linear(weight.shape[1], len(weight), bias=False)
    linear.weight.data = weight.detach().clone()
    return linear
