"""What the probes compute, the naive way: whole forwards of hooked or copied models."""

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch.nn import Module
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from absorb_plugin.blocks import BlockMap
from absorb_plugin.signals.noise import unit_noise

Batch = Mapping[str, torch.Tensor]


def hidden(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def states(
    model: PreTrainedModel,
    blocks: Sequence[Module],
    batch: Batch,
    at: int | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Hidden state after every block; after block `at` changed on its way."""
    seen: dict[int, torch.Tensor] = {}

    def hook(index: int) -> Callable:
        def keep(module: Module, args: tuple, output: object) -> object:
            state = hidden(output)
            if index == at:
                state = change(state)
            seen[index] = state.clone()
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return keep

    handles = [b.register_forward_hook(hook(i)) for i, b in enumerate(blocks)]
    try:
        model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[index] for index in range(len(blocks))]


def noise_profile(
    model: PreTrainedModel,
    blocks: Sequence[Module],
    batch: Batch,
    magnitude: float,
    seed: int,
    spared: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Drift R (L, L), ratio r (L,) and realignment (L, L).

    :param spared: id of the token that gets no noise and does not count
    """
    kept = batch["attention_mask"].bool()
    if spared is not None:
        kept &= batch["input_ids"] != spared
    noise = unit_noise(batch, model.config.hidden_size, seed) * kept.unsqueeze(-1)
    clean = states(model, blocks, batch)
    count = len(blocks)
    drift, cosine = np.full((2, count, count), np.nan)
    ratio = np.zeros(count)
    for l in range(count):

        def add(state: torch.Tensor) -> torch.Tensor:
            return state + magnitude * state.norm(dim=-1, keepdim=True) * noise

        noisy = states(model, blocks, batch, l, add)
        relative = [
            ((n - c).norm(dim=-1) / c.norm(dim=-1))[kept] for n, c in zip(noisy, clean)
        ]
        for k in range(l, count):
            drift[l, k] = relative[k].mean()
            dot = (noisy[k] * clean[k]).sum(-1)
            norms = noisy[k].norm(dim=-1) * clean[k].norm(dim=-1)
            cosine[l, k] = (dot / norms)[kept].mean()
        ratio[l] = (relative[-1] / relative[l]).mean()
    return drift, ratio, cosine


@torch.no_grad()
def square_sums(
    model: PreTrainedModel, blocks: BlockMap, batch: Batch
) -> dict[str, torch.Tensor]:
    """Full name of a Linear -> mean over samples of Σ_tokens x², padding left out."""
    sums: dict[str, torch.Tensor] = {}
    kept = batch["attention_mask"].bool()

    def hook(name: str) -> Callable:
        def add(module: Module, args: tuple) -> None:
            x = args[0].flatten(0, -2)
            if len(x) == kept.numel():  # else an expert's choice of tokens
                x = x[kept.flatten()]
            sums[name] = (x**2).sum(dim=0) / len(kept)

        return add

    handles = [
        linear.register_forward_pre_hook(hook(name))
        for name, linear in blocks.linears().items()
    ]
    model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def order(weight: torch.Tensor, square_sum: torch.Tensor) -> torch.Tensor:
    """Rank of every weight in its row by Wanda's score, 0 the first to be pruned."""
    return (weight.abs() * square_sum.sqrt()).argsort(dim=1).argsort(dim=1)


def masked(
    model: PreTrainedModel,
    sums: Mapping[str, torch.Tensor],
    sparsities: Mapping[str, float],
) -> PreTrainedModel:
    """A copy with the least scores of every row of the named Linears written to 0."""
    pruned = copy.deepcopy(model)
    for name, sparsity in sparsities.items():
        weight = pruned.get_submodule(name).weight
        ranks = order(weight.data, sums[name])
        weight.data[ranks < int(weight.shape[1] * sparsity)] = 0.0
    return pruned


def per_linear(blocks: BlockMap, sparsities: Sequence[float]) -> dict[str, float]:
    """Full name of a Linear -> its entry of an allocation."""
    return dict(zip(blocks.linears(), map(float, sparsities), strict=True))


def loss_sums(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Next-token cross-entropy, summed per sample, shape (samples,)."""
    ids, kept = batch["input_ids"], batch["attention_mask"].bool()
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * (kept[:, 1:] & kept[:, :-1])).sum(dim=1)


def predicted(batch: Batch) -> int:
    kept = batch["attention_mask"].bool()
    return int((kept[:, 1:] & kept[:, :-1]).sum())
