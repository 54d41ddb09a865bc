"""
The noise probe (arXiv 2606.15161): how the rest of the network answers to noise after
each block.

After block l every token's hidden state h_l gets noise of relative size η in a random
direction, and the noisy state runs on through blocks l+1 … L:

    h'_l = h_l + η·‖h_l‖₂·n,  ‖n‖₂ = 1
    drift  R_{l→k} = ‖h'_k − h_k‖₂ / ‖h_k‖₂        (mean over tokens)
    ratio  r_l     = E[R_{l→L} / R_{l→l}]          (r_L = 1)

r_l < 1: the rest of the network absorbs the perturbation; r_l > 1: it amplifies it.

Beside it runs the rounding floor, the drift that arithmetic alone makes: of a 16-bit
run from a float32 run of the same weights, or, where the probe itself computes in
float32, the drift of a perturbation of one rounding unit after the first block.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from loguru import logger
from pydantic import Field

from absorb_plugin import distributed
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.probe import Needs, Probe, RunBlock
from absorb_plugin.groups import Groups
from absorb_plugin.names import NoiseDtype, SinkTokens
from absorb_plugin.precision import widest_float
from absorb_plugin.search.correction import direction_from_ratio
from absorb_plugin.search.standard_error import standard_error
from absorb_plugin.signals.base import Context, Signal

__all__ = ["Noise", "NoiseProbe", "NoiseProfile", "measure_until", "unit_noise"]

# Every ratio should be known to this, relative to itself.
KNOWN = 0.05
# Noise shorter than so many times the rounding floor measures arithmetic.
FLOOR_MARGIN = 5.0

# A token whose norm is so many times the sample's median is a sink: noise relative to
# its own norm would break what the other tokens attend to.
SINK_NORM = 20.0
FLOAT32_UNIT = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class NoiseProfile:
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
    :param floor: drift after every block that rounding alone makes, shape (L,)
    """

    drift: np.ndarray
    ratio: np.ndarray
    ratio_error: np.ndarray
    realignment: np.ndarray
    samples: int
    tokens: int
    spared: dict[int, list[int]]
    floor: np.ndarray

    def uncertainty(self) -> float:
        """
        Largest standard error of a ratio, relative to it; NaN for one sample, infinite
        where a ratio is 0 since rounding swallowed the noise.
        """
        relative = np.full_like(self.ratio, np.inf)
        np.divide(self.ratio_error, self.ratio, out=relative, where=self.ratio > 0)
        return float(relative.max())

    def below_floor(self, magnitude: float) -> bool:
        """Whether noise of relative length η is too near to the rounding floor."""
        return bool(magnitude < FLOOR_MARGIN * self.floor[-1])

    def warn_if_below_floor(self, magnitude: float) -> None:
        if self.below_floor(magnitude):
            logger.warning(
                f"signal_args magnitude={magnitude:g} is below {FLOOR_MARGIN:g} times "
                f"the rounding floor of {self.floor[-1]:.1e}: the ratios are partly "
                "arithmetic. Set dtype: float32 in signal_args, or a larger magnitude"
            )


class NoiseProbe(Probe):
    """
    Measures drift after every injection block.

    Costs L(L−1)/2 block passes beside the model's own L, and L for the rounding floor;
    in float32 another L for a clean run of its own.

    :param injections: indices of the blocks after which noise is put
    :param blocks: L, number of all blocks
    :param magnitude: η
    :param seed: seed of the noise
    :param sink_tokens: "perturb", "spare" or "auto": which tokens stay without noise;
        they are left out of all means
    :param dtype: "model", or "float32": what the trajectories are computed in
    """

    state = ("_sums", "_counts", "_floors", "_spared")

    def __init__(
        self,
        injections: Sequence[int],
        blocks: int,
        magnitude: float,
        seed: int,
        sink_tokens: str = "auto",
        dtype: str = "model",
    ) -> None:
        self._rows = {block: row for row, block in enumerate(injections)}
        self._blocks = blocks
        self._magnitude, self._seed, self._sinks = magnitude, seed, sink_tokens
        self._dtype = dtype
        # One entry per sample: sums over its tokens, divided only at the end.
        self._sums: list[np.ndarray] = []  # (3, injections, blocks): R, cos, R/R_{l→l}
        self._counts: list[np.ndarray] = []  # (injections,): tokens with noise
        self._floors: list[np.ndarray] = []  # (2, blocks): sum over tokens, number
        self._spared: set[tuple[int, int]] = set()  # (injection, position)

    @property
    def needs(self) -> Needs:
        trajectories = len(self._rows) + 2
        if self._dtype == "float32":  # of twice the size in a 16-bit model
            trajectories *= 2
        return Needs(trajectories=trajectories, float32=True)

    def start(self, batch: Batch) -> None:
        self._noisy: dict[int, torch.Tensor] = {}
        self._injected: dict[int, torch.Tensor] = {}
        self._counted: dict[int, torch.Tensor] = {}
        self._mask = token_mask(batch)
        self._batch = batch
        self._noise: torch.Tensor | None = None
        self._clean: torch.Tensor | None = None
        self._reference: torch.Tensor | None = None  # of the rounding floor
        shape = (3, len(self._rows), self._blocks)
        self._sums += [np.full(shape, np.nan) for _ in self._mask]
        self._counts += [np.zeros(shape[1]) for _ in self._mask]
        self._floors += [np.zeros((2, self._blocks)) for _ in self._mask]

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        state = self._advance(before, after, run)
        clean = state.float()
        norm = clean.norm(dim=-1)
        counted = self._mask & ~self._is_sink(norm)
        if index in self._rows:
            self._inject(index, state, norm, counted)
        self._record_floor(index, clean, norm, counted)
        for source, hidden in self._noisy.items():
            noisy = hidden.float()
            drift = _drift(noisy, clean, norm)
            injected = self._injected.setdefault(source, drift)
            ratio = torch.where(injected > 0, drift / injected, 0.0)
            cosine = torch.cosine_similarity(noisy, clean, dim=-1)
            self._record(source, index, torch.stack([drift, cosine, ratio]))

    def finish(self, batch: Batch, head: OutputHead) -> None:
        del self._noisy, self._injected, self._counted, self._noise, self._batch
        del self._clean, self._reference

    def result(self) -> NoiseProfile:
        """
        Means over all samples and tokens seen so far.

        :raises ValueError: if after some block no token got noise
        """
        sums = np.array(distributed.gather_shares(self._sums))
        counts = np.array(distributed.gather_shares(self._counts))
        total = counts.sum(axis=0)
        if not total.all():
            raise ValueError(
                "the noise probe has no token to put noise on: the calibration samples "
                "are too short, or sink_tokens spares all of their tokens"
            )
        drift, realignment, ratios = sums.sum(axis=0) / total[:, None]
        ratio, samples = ratios[:, -1], len(counts)
        error = standard_error(sums[:, 2, :, -1], counts)
        floors = distributed.gather_shares(self._floors)
        floor, counted = np.array(floors).sum(axis=0)
        spared: dict[int, list[int]] = {}
        for source, position in sorted(set().union(*distributed.gather(self._spared))):
            spared.setdefault(source, []).append(position)
        return NoiseProfile(
            drift=drift,
            ratio=ratio,
            ratio_error=error,
            realignment=realignment,
            samples=samples,
            tokens=int(total.max()),
            spared=spared,
            floor=floor / counted,
        )

    def _advance(
        self, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> torch.Tensor:
        """All trajectories through the block; the clean state behind it."""
        if after.dtype == torch.float32:
            self._run_all(run)
            return after
        if self._dtype == "model":
            self._noisy = {source: run(h) for source, h in self._noisy.items()}
            with run.in_float32() as exact:
                start = self._reference
                self._reference = exact(before.float() if start is None else start)
            return after
        with run.in_float32() as exact:
            start = self._clean
            self._clean = exact(before.float() if start is None else start)
            self._run_all(exact)
        return self._clean

    def _run_all(self, run: RunBlock) -> None:
        self._noisy = {source: run(h) for source, h in self._noisy.items()}
        if self._reference is not None:
            self._reference = run(self._reference)

    def _record_floor(
        self,
        index: int,
        clean: torch.Tensor,
        norm: torch.Tensor,
        counted: torch.Tensor,
    ) -> None:
        if self._reference is None:  # computing in float32: one rounding unit
            size = torch.where(counted, FLOAT32_UNIT * norm, 0.0)
            self._reference = self._perturbed(clean, size)
        drift = _drift(self._reference, clean, norm)
        kept, wide = torch.where(counted, drift, 0.0), widest_float(drift.device)
        sums = kept.sum(dim=1, dtype=wide).tolist()
        start = len(self._floors) - len(sums)
        for sample, pair in enumerate(zip(sums, counted.sum(dim=1).tolist())):
            self._floors[start + sample][:, index] = pair

    def _perturbed(self, hidden: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """:param size: length of the noise, shape (batch, tokens)"""
        if self._noise is None:
            # One direction per token for all injection blocks: blocks are compared
            # under the same noise, which takes its share out of their differences.
            self._noise = unit_noise(self._batch, hidden.shape[-1], self._seed)
        self._noise = self._noise.to(hidden.device)
        noisy = hidden.float() + size.unsqueeze(-1) * self._noise
        return noisy.to(hidden.dtype)

    def _inject(
        self,
        index: int,
        hidden: torch.Tensor,
        norm: torch.Tensor,
        counted: torch.Tensor,
    ) -> None:
        size = torch.where(counted, self._magnitude * norm, 0.0)
        self._noisy[index] = self._perturbed(hidden, size)
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
        kept = torch.where(self._counted[source], values, 0.0)
        sums = kept.sum(dim=-1, dtype=widest_float(values.device))
        start = len(self._sums) - sums.shape[1]
        for sample, triple in enumerate(sums.T.tolist()):
            self._sums[start + sample][:, self._rows[source], index] = triple


def measure_until(
    run: Callable[[list[dict]], None],
    probe: NoiseProbe,
    samples: Sequence[dict],
    first: int,
) -> NoiseProfile:
    """
    Run the probe on the first few samples, and on as many again until every ratio is
    known to 5 % (standard error over samples) or none is left.

    :param run: runs the probe over samples
    :param first: number of samples to begin with
    """
    done = 0
    while True:
        run(list(samples[done:first]))
        profile = probe.result()
        done, first = first, 2 * first
        if done >= len(samples) or profile.uncertainty() <= KNOWN:
            break
    if profile.uncertainty() > KNOWN:
        logger.info(
            f"After {profile.samples} samples a ratio is known to "
            f"{profile.uncertainty():.0%} only"
        )
    return profile


def _drift(
    state: torch.Tensor, clean: torch.Tensor, norm: torch.Tensor
) -> torch.Tensor:
    """R per token, shape (batch, tokens)."""
    return torch.where(norm > 0, (state - clean).norm(dim=-1) / norm, 0.0)


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


class Noise(Signal):
    """
    The paper's ratio: how the dense network absorbs or amplifies noise after each
    block.

    :param magnitude: η, length of the noise relative to the hidden state
    :param dtype: what the probe computes in, "model" or "float32"; in 16 bits a small η
        is lost in rounding, whose floor is measured and reported
    :param samples: calibration samples the probe begins with; it takes as many again
        until every ratio is known to 5 %
    :param samples_limit: it stops there
    :param seed: of the noise
    :param sink_tokens: "perturb" puts noise on all tokens, "spare" leaves out the first
        of every sample, "auto" those whose norm is beyond 20 times the median
    """

    name: ClassVar[str] = "noise"
    by_loss: ClassVar[bool] = False
    once: ClassVar[bool] = True

    magnitude: float = Field(default=1e-2, gt=0, allow_inf_nan=False)
    dtype: NoiseDtype = "model"
    samples: int = Field(default=8, ge=1)
    samples_limit: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    sink_tokens: SinkTokens = "auto"

    def direction(self, context: Context, allocation: np.ndarray) -> np.ndarray:
        profile = self.measured(context)
        by_block = Groups.at("block", context.blocks)
        by_linear = by_block.spread(direction_from_ratio(profile.ratio))
        return context.groups.mean(by_linear)

    def measured(self, context: Context) -> NoiseProfile:
        """The profile that the direction is of; it costs as much as all the rest."""
        if self not in context.known:
            profile = self.profile(context, context.samples.in_turn())
            profile.warn_if_below_floor(self.magnitude)
            context.known[self] = profile
        return context.known[self]

    def profile(self, context: Context, samples: Sequence[dict]) -> NoiseProfile:
        """What the probe measures on some samples; also for the report."""
        probe = NoiseProbe(
            context.blocks.prunable,
            len(context.blocks),
            self.magnitude,
            self.seed,
            self.sink_tokens,
            self.dtype,
        )
        most = max(self.samples, self.samples_limit)
        profile = measure_until(
            lambda chunk: context.runner.run("Noise probe", chunk, probe),
            probe,
            samples[:most],
            self.samples,
        )
        return profile
