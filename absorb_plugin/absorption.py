"""
The absorption probe (arXiv 2606.15161): how the rest of the network answers to noise
behind each block.

Behind block l every token's hidden state h_l gets noise of relative size η in a random
direction, and the noisy state runs on through blocks l+1 … L:

    h'_l = h_l + η·‖h_l‖₂·n,  ‖n‖₂ = 1
    drift  R_{l→k} = ‖h'_k − h_k‖₂ / ‖h_k‖₂        (mean over tokens)
    ratio  r_l     = E[R_{l→L} / R_{l→l}]          (r_L = 1)

r_l < 1: the rest of the network absorbs the perturbation; r_l > 1: it amplifies it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.sampling import standard_error
from absorb_plugin.sweep import Passenger, RunBlock, Tail

__all__ = ["AbsorptionProfile", "NoiseProbe", "unit_noise"]

# A token whose norm is so many times the sample's median is a sink: noise relative to
# its own norm would break what the other tokens attend to.
SINK_NORM = 20.0


@dataclass(frozen=True)
class AbsorptionProfile:
    """
    What the noise probe measured.

    :param drift: R_{l→k}, shape (injections, L); NaN where k < l
    :param ratio: r_l, shape (injections,)
    :param ratio_error: standard error of r_l over samples, shape (injections,); NaN
        with fewer than two samples
    :param realignment: mean cos(h'_k, h_k), shape (injections, L); NaN where k < l
    :param samples: number of calibration samples
    :param tokens: number of tokens that got noise, at most over the injections
    :param spared: injection block -> positions of tokens that got none (sinks)
    """

    drift: np.ndarray
    ratio: np.ndarray
    ratio_error: np.ndarray
    realignment: np.ndarray
    samples: int
    tokens: int
    spared: dict[int, list[int]]


class NoiseProbe(Passenger):
    """
    Passenger of a sweep that measures drift behind every injection block.

    Costs L(L−1)/2 block passes beside the model's own L.

    :param injections: indices of the blocks behind which noise is put
    :param blocks: L, number of all blocks
    :param magnitude: η
    :param seed: seed of the noise
    :param sink_tokens: "perturb", "spare" or "auto": which tokens stay without noise;
        they are left out of all means
    """

    kept = ("_sums", "_counts", "_spared")

    def __init__(
        self,
        injections: Sequence[int],
        blocks: int,
        magnitude: float,
        seed: int,
        sink_tokens: str = "auto",
    ) -> None:
        self._rows = {block: row for row, block in enumerate(injections)}
        self._blocks = blocks
        self._magnitude, self._seed, self._sinks = magnitude, seed, sink_tokens
        self.trajectories = len(injections)
        # One entry per sample: sums over its tokens, divided only at the end.
        self._sums: list[np.ndarray] = []  # (3, injections, blocks): R, cos, R/R_{l→l}
        self._counts: list[np.ndarray] = []  # (injections,): tokens with noise
        self._spared: set[tuple[int, int]] = set()  # (injection, position)

    def start(self, batch: Batch) -> None:
        self._noisy: dict[int, torch.Tensor] = {}
        self._injected: dict[int, torch.Tensor] = {}
        self._counted: dict[int, torch.Tensor] = {}
        self._mask = token_mask(batch)
        self._batch = batch
        self._noise: torch.Tensor | None = None
        shape = (3, len(self._rows), self._blocks)
        self._sums += [np.full(shape, np.nan) for _ in self._mask]
        self._counts += [np.zeros(shape[1]) for _ in self._mask]

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        for source, hidden in self._noisy.items():
            self._noisy[source] = run(hidden)
        if index in self._rows:
            self._inject(index, after)
        clean = after.float()
        norm = clean.norm(dim=-1)
        for source, hidden in self._noisy.items():
            noisy = hidden.float()
            drift = torch.where(norm > 0, (noisy - clean).norm(dim=-1) / norm, 0.0)
            injected = self._injected.setdefault(source, drift)
            ratio = torch.where(injected > 0, drift / injected, 0.0)
            cosine = torch.cosine_similarity(noisy, clean, dim=-1)
            self._record(source, index, torch.stack([drift, cosine, ratio]))

    def finish(self, batch: Batch, tail: Tail) -> None:
        del self._noisy, self._injected, self._counted, self._noise, self._batch

    def profile(self) -> AbsorptionProfile:
        """
        Means over all samples and tokens seen so far.

        :raises ValueError: if behind some block no token got noise
        """
        sums, counts = np.array(self._sums), np.array(self._counts)
        total = counts.sum(axis=0)
        if not total.all():
            raise ValueError(
                "the noise probe has no token to put noise on: the calibration samples "
                "are too short, or sink_tokens spares all of their tokens"
            )
        drift, realignment, ratios = sums.sum(axis=0) / total[:, None]
        ratio, samples = ratios[:, -1], len(counts)
        error = standard_error(sums[:, 2, :, -1], counts)
        spared: dict[int, list[int]] = {}
        for source, position in sorted(self._spared):
            spared.setdefault(source, []).append(position)
        return AbsorptionProfile(
            drift, ratio, error, realignment, samples, int(total.max()), spared
        )

    def _inject(self, index: int, hidden: torch.Tensor) -> None:
        if self._noise is None:
            # One direction per token for all injection blocks: blocks are compared
            # under the same noise, which takes its share out of their differences.
            self._noise = unit_noise(self._batch, hidden.shape[-1], self._seed)
            self._noise = self._noise.to(hidden.device)
        full = hidden.float()
        norm = full.norm(dim=-1)
        counted = self._mask & ~self._is_sink(norm)
        size = torch.where(counted, self._magnitude * norm, 0.0).unsqueeze(-1)
        self._noisy[index] = (full + size * self._noise).to(hidden.dtype)
        self._counted[index] = counted
        start = len(self._counts) - len(counted)
        for sample, count in enumerate(counted.sum(dim=1).tolist()):
            self._counts[start + sample][self._rows[index]] = count
        for _, position in (self._mask & ~counted).nonzero().tolist():
            self._spared.add((index, position))

    def _is_sink(self, norm: torch.Tensor) -> torch.Tensor:
        """Tokens to spare, bool of shape (batch, tokens)."""
        if self._sinks == "perturb":
            return torch.zeros_like(self._mask)
        if self._sinks == "spare":
            return self._mask & (self._mask.cumsum(dim=1) == 1)
        # nanmedian: padding must not count
        kept = torch.where(self._mask, norm, torch.nan)
        median = kept.nanmedian(dim=1, keepdim=True).values
        return norm > SINK_NORM * median

    def _record(self, source: int, index: int, values: torch.Tensor) -> None:
        """:param values: drift, cosine and ratio, shape (3, batch, tokens)"""
        sums = torch.where(self._counted[source], values.double(), 0.0).sum(dim=-1)
        start = len(self._sums) - sums.shape[1]
        for sample, triple in enumerate(sums.T.tolist()):
            self._sums[start + sample][:, self._rows[source], index] = triple


def unit_noise(batch: Batch, hidden_size: int, seed: int) -> torch.Tensor:
    """
    Gaussian directions of unit length. A sample's noise depends on the seed and on
    that sample's own tokens alone: not on padding, batch, order, rank or device.

    :return: float32 on the CPU, shape (batch, tokens, hidden_size); 0 on padding
    """
    mask = token_mask(batch).cpu()
    noise = torch.zeros(*mask.shape, hidden_size)
    for sample, (tokens, kept) in enumerate(
        zip(batch["input_ids"].cpu(), mask, strict=True)
    ):
        content = tokens[kept].to(torch.int64).numpy().tobytes()
        digest = hashlib.sha256(seed.to_bytes(8, "big", signed=True) + content)
        generator = torch.Generator().manual_seed(
            int.from_bytes(digest.digest()[:8], "big", signed=True)
        )
        gaussian = torch.randn(int(kept.sum()), hidden_size, generator=generator)
        noise[sample, kept] = gaussian / gaussian.norm(dim=-1, keepdim=True)
    return noise
