"""
How drift and ratio depend on the length η of the noise.

All η share one forward, so they are compared on the same samples under the same noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch.nn import Module

from absorb_plugin.blocks import find_blocks
from absorb_plugin.calibration import join_samples, samples_of
from absorb_plugin.devices import computing_on_one_device, dtype_of
from absorb_plugin.files import json_numbers
from absorb_plugin.forward.memory import limit_by_machine
from absorb_plugin.forward.run import run_probes
from absorb_plugin.language_model import check_ids, language_model
from absorb_plugin.signals.noise import NoiseProbe, NoiseProfile
from absorb_plugin.torch_state import plain_torch

__all__ = ["NoiseScan", "as_dict", "scan_noise"]


@dataclass(frozen=True)
class NoiseScan:
    """
    What the noise probe found at several η.

    :param names: the prunable blocks, after each of which noise was put
    :param magnitudes: η, ascending
    :param profiles: one per η
    :param dtype: what the trajectories were computed in
    """

    names: list[str]
    magnitudes: list[float]
    profiles: list[NoiseProfile]
    dtype: str

    @property
    def floor(self) -> np.ndarray:
        """Drift after every block that rounding alone makes, shape (L,)."""
        return self.profiles[0].floor

    def below_floor(self) -> list[float]:
        """The η that are too near to the rounding floor."""
        pairs = zip(self.magnitudes, self.profiles, strict=True)
        return [eta for eta, profile in pairs if profile.below_floor(eta)]


@plain_torch()
def scan_noise(
    model: Module,
    samples: Dataset,
    magnitudes: Sequence[float],
    *,
    seed: int = 0,
    sink_tokens: str = "auto",
    noise_dtype: str = "model",
    probe_memory: int | Literal["auto"] = "auto",
) -> NoiseScan:
    """
    :param model: the dense model; its weights are not touched
    :param samples: rows of `input_ids` and `attention_mask`
    :param magnitudes: η, ascending
    :param seed: of the noise
    :param sink_tokens: as of `Noise`
    :param noise_dtype: its `dtype`
    :param probe_memory: as in `AbsorptionAllocationModifier`
    """
    blocks = find_blocks(model)
    batches = join_samples(samples_of(samples))
    check_ids(model, batches)
    probes = [
        NoiseProbe(blocks.prunable, len(blocks), eta, seed, sink_tokens, noise_dtype)
        for eta in magnitudes
    ]
    with computing_on_one_device(model):
        if probe_memory == "auto":
            probe_memory = limit_by_machine(model, blocks.modules)
        run_probes(
            model,
            blocks,
            batches,
            probes,
            memory=probe_memory,
            description=f"Noise of {len(probes)} magnitudes",
        )
    dtype = (
        torch.float32 if noise_dtype == "float32" else dtype_of(language_model(model))
    )
    return NoiseScan(
        [blocks.blocks[index].name for index in blocks.prunable],
        list(magnitudes),
        [probe.result() for probe in probes],
        str(dtype).removeprefix("torch."),
    )


def as_dict(found: NoiseScan) -> dict[str, Any]:
    """What `absorb noise --json` prints; NaN is None."""
    return {
        "dtype": found.dtype,
        "samples": found.profiles[0].samples,
        "blocks": found.names,
        "floor": found.floor.tolist(),
        "below_floor": found.below_floor(),
        "eta": [
            {
                "eta": eta,
                "tokens": profile.tokens,
                "ratio": json_numbers(profile.ratio),
                "ratio_error": json_numbers(profile.ratio_error),
                "drift": [json_numbers(row) for row in profile.drift],
                "realignment": [json_numbers(row) for row in profile.realignment],
                "spared_positions": {
                    str(index): positions for index, positions in profile.spared.items()
                },
            }
            for eta, profile in zip(found.magnitudes, found.profiles, strict=True)
        ],
    }
