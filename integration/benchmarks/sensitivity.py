"""
How much more sparsity any allocation could bear at the loss of uniform pruning, where
little is lost:

    python integration/benchmarks/sensitivity.py MODEL --text FILE [--sparsity 0.3] \
        [--samples 8] [--seq-len 256] [--each linear] [--seed 0]

Prunes by Wanda, each kind of Linear alone in all blocks and each block alone (with
`--each linear` each Linear alone), and measures the KL divergence from the dense model.
What Linears cost is taken to add up, and to grow as a power n of their sparsity, which
uniform pruning at two sparsities tells. With d the cost of a Linear per share p of all
weights, the cheapest allocation is then ∝ d^(-1/(n-1)), and bears at the loss of
uniform pruning at s

    s · (Σ p·d)^(1/n) · (Σ p·d^(-1/(n-1)))^(1-1/n)

Both are checked: how far the parts add up to the whole, and what the allocation costs
beside uniform pruning, at the sparsity that it is said to bear, on the windows that
measured and on as many others.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import Linear
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.evaluation.documents import read_text
from absorb_plugin.evaluation.text import calibration_samples

Sparsities = Mapping[str, float]


class Model:
    """
    A dense model, and what pruning some of its Linears does to what it says.

    :param calibration: token ids that the scores of weights are made by, (n, tokens)
    """

    def __init__(self, model: PreTrainedModel, calibration: torch.Tensor) -> None:
        self.model = model
        self.linears: dict[str, Linear] = {
            block.full_name(name): linear
            for block in find_blocks(model).blocks
            for name, linear in block.linears.items()
        }
        self._square_sums: dict[str, torch.Tensor] = {}
        hooks = [
            linear.register_forward_pre_hook(self._observe(name))
            for name, linear in self.linears.items()
        ]
        for sample in calibration:
            self.log_probabilities(sample)
        for hook in hooks:
            hook.remove()

    def _observe(self, name: str):
        def observe(module: Linear, args: tuple[torch.Tensor]) -> None:
            square_sums = args[0].flatten(0, -2).float().square().sum(dim=0)
            self._square_sums[name] = self._square_sums.get(name, 0.0) + square_sums

        return observe

    @torch.no_grad()
    def log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """(tokens,) -> (tokens - 1, vocabulary); of a sample, for they are many."""
        logits = self.model(input_ids=ids[None].to(self.model.device)).logits[0]
        return logits[:-1].float().log_softmax(dim=-1)

    def divergence(
        self, sparsities: Sparsities, ids: torch.Tensor, dense: Sequence[torch.Tensor]
    ) -> float:
        """
        KL(dense ‖ pruned), nats per token; the weights come back.

        :param dense: log probabilities of every sample
        """
        own = {name: self.linears[name].weight.data for name in sparsities}
        try:
            for name, sparsity in sparsities.items():
                self.linears[name].weight.data = self._masked(name, sparsity)
            found = [
                self._kl(sample, said) for sample, said in zip(ids, dense, strict=True)
            ]
        finally:
            for name, weight in own.items():
                self.linears[name].weight.data = weight
        return float(np.mean(found))

    def _kl(self, sample: torch.Tensor, dense: torch.Tensor) -> float:
        pruned = self.log_probabilities(sample)
        return float((dense.exp() * (dense - pruned)).sum(dim=-1).mean())

    def _masked(self, name: str, sparsity: float) -> torch.Tensor:
        weight = self.linears[name].weight.data
        scores = weight.abs().float() * self._square_sums[name].sqrt()
        least = scores.argsort(dim=1)[:, : int(sparsity * weight.shape[1])]
        return weight.scatter(1, least, 0.0)


@dataclass(frozen=True)
class Costs:
    """
    :param density: KL of every Linear per share of all weights, pruned alone
    :param share: of all weights
    :param power: of the sparsity, by which the KL of uniform pruning grows
    """

    density: np.ndarray
    share: np.ndarray
    power: float

    def bears(self, sparsity: float) -> tuple[float, np.ndarray]:
        """
        :param sparsity: of uniform pruning
        :return: what the cheapest allocation bears at that loss, and that allocation
        """
        density = np.maximum(self.density, 1e-3 * (self.share * self.density).sum())
        wished = density ** (-1 / (self.power - 1))
        even = (self.share * density).sum()
        best = (self.share * wished).sum()
        found = sparsity * even ** (1 / self.power) * best ** (1 - 1 / self.power)
        return found, wished * found / best


def parts_of(names: list[str], each: str) -> dict[str, list[str]]:
    """What is pruned alone: name -> its Linears."""
    if each == "linear":
        return {name: [name] for name in names}
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(f"kind {kind(name)}", []).append(name)
        parts.setdefault(f"block {block(name)}", []).append(name)
    return parts


def kind(name: str) -> str:
    return name.rpartition(".")[2]


def block(name: str) -> str:
    return next(part for part in name.split(".") if part.isdigit())


def density_of(names: list[str], each: str, found: Mapping[str, float]) -> np.ndarray:
    """
    Of every Linear; from kinds and blocks as if each were so many times as dear as all.
    """
    if each == "linear":
        return np.array([found[name] for name in names])
    of_kind = np.array([found[f"kind {kind(name)}"] for name in names])
    of_block = np.array([found[f"block {block(name)}"] for name in names])
    return of_kind * of_block / found["all"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--each", choices=["part", "linear"], default="part")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = calibration_samples(
        read_text(options.text),
        tokenizer,
        3 * options.samples,
        options.seq_len,
        options.seed,
    )
    shortest = min(map(len, samples["input_ids"]))
    ids = torch.tensor([sample[:shortest] for sample in samples["input_ids"]])
    calibration, measuring, others = ids.chunk(3)
    model = Model(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval(),
        calibration,
    )
    names = list(model.linears)
    sizes = np.array([model.linears[name].weight.numel() for name in names])
    share = dict(zip(names, sizes / sizes.sum(), strict=True))
    dense = list(map(model.log_probabilities, measuring))

    def cost(part: list[str], sparsity: float) -> float:
        return model.divergence(dict.fromkeys(part, sparsity), measuring, dense)

    low, high = cost(names, 0.8 * options.sparsity), cost(names, options.sparsity)
    power = float(np.log(high / low) / np.log(1 / 0.8))
    print(f"all: KL {high:.5f} nats per token, ∝ s^{power:.2f}")
    found = {"all": high}
    for part, own in tqdm(parts_of(names, options.each).items(), desc="Pruning alone"):
        weights = sum(share[name] for name in own)
        found[part] = cost(own, options.sparsity) / weights
        tqdm.write(f"{part}: {weights:.1%} of weights, KL per share {found[part]:.5f}")
    density = density_of(names, options.each, found)
    costs = Costs(density, np.array(list(share.values())), power)
    together = float((costs.share * density).sum())
    print(f"added up: {together:.5f}, {together / high:.2f} times all at once")
    bears, best = costs.bears(options.sparsity)
    if best.max() >= 1:
        parser.error("a Linear would lose all its weights: give a lower --sparsity")
    print(
        f"at the loss of uniform pruning at {options.sparsity:.1%} the cheapest "
        f"allocation bears {bears:.1%}: {100 * (bears - options.sparsity):.1f} points "
        "more"
    )
    by_name = dict(zip(names, best, strict=True))
    uniform = dict.fromkeys(names, options.sparsity)
    dense_of_others = list(map(model.log_probabilities, others))
    high_of_others = model.divergence(uniform, others, dense_of_others)
    for text, windows, said, beside in (
        ("measured by", measuring, dense, high),
        ("of others", others, dense_of_others, high_of_others),
    ):
        own = model.divergence(by_name, windows, said)
        points = 100 * bears * ((beside / own) ** (1 / power) - 1)
        print(
            f"windows {text}: KL {own:.5f} there, {beside:.5f} of uniform pruning: "
            f"{points:+.1f} points beside what was said"
        )


if __name__ == "__main__":
    main()
