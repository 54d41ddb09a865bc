"""
Dose and depth: how drift and ratio depend on the length η of the noise.

All η ride on one sweep, so they are compared on the same samples under the same noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from absorb_plugin.absorption import AbsorptionProfile, NoiseProbe
from absorb_plugin.blocks import find_blocks
from absorb_plugin.calibration import join_samples, samples_of
from absorb_plugin.devices import compute_on_one_device
from absorb_plugin.files import json_numbers
from absorb_plugin.sweep import sweep

__all__ = ["DoseProfile", "as_dict", "measure_doses", "parse_magnitudes", "render"]


@dataclass(frozen=True)
class DoseProfile:
    """
    What the noise probe found at several η.

    :param names: the prunable blocks, behind each of which noise was put
    :param magnitudes: η, ascending
    :param profiles: one per η
    :param dtype: what the trajectories were computed in
    """

    names: list[str]
    magnitudes: list[float]
    profiles: list[AbsorptionProfile]
    dtype: str

    @property
    def floor(self) -> np.ndarray:
        """Drift behind every block that rounding alone makes, shape (L,)."""
        return self.profiles[0].floor

    def drowned(self) -> list[float]:
        """The η that are too near to the rounding floor."""
        pairs = zip(self.magnitudes, self.profiles, strict=True)
        return [eta for eta, profile in pairs if profile.drowned(eta)]


def parse_magnitudes(text: str) -> list[float]:
    """
    :param text: numbers with commas between them
    :return: ascending, each once
    :raises ValueError: naming what is no positive number
    """
    found = set()
    for part in text.split(","):
        try:
            eta = float(part)
        except ValueError:
            eta = np.nan
        if not (np.isfinite(eta) and eta > 0):
            raise ValueError(
                f"--eta {part.strip()!r}: write positive numbers with commas between "
                "them, as in --eta 1e-3,1e-2,0.1"
            )
        found.add(eta)
    return sorted(found)


def measure_doses(
    model: PreTrainedModel,
    samples: Dataset,
    magnitudes: Sequence[float],
    *,
    seed: int = 0,
    sink_tokens: str = "auto",
    noise_dtype: str = "model",
    sweep_memory: int = 4 * 2**30,
) -> DoseProfile:
    """
    :param model: the dense model; its weights are not touched
    :param samples: rows of `input_ids` and `attention_mask`
    :param magnitudes: η, ascending
    :param seed: of the noise
    :param sink_tokens: as in `AbsorptionAllocationModifier`
    :param noise_dtype: as in `AbsorptionAllocationModifier`
    :param sweep_memory: bytes that the hidden states may take
    """
    compute_on_one_device(model)
    blocks = find_blocks(model)
    batches = join_samples(samples_of(samples))
    probes = [
        NoiseProbe(blocks.prunable, len(blocks), eta, seed, sink_tokens, noise_dtype)
        for eta in magnitudes
    ]
    names = [block.name for block in blocks.blocks]
    sweep(
        model,
        blocks.modules,
        names,
        batches,
        probes,
        memory=sweep_memory,
        description=f"Noise of {len(probes)} magnitudes",
    )
    dtype = torch.float32 if noise_dtype == "float32" else model.dtype
    return DoseProfile(
        [names[index] for index in blocks.prunable],
        list(magnitudes),
        [probe.profile() for probe in probes],
        str(dtype).removeprefix("torch."),
    )


def as_dict(found: DoseProfile) -> dict[str, Any]:
    """What `absorb profile --json` prints; NaN is None."""
    return {
        "dtype": found.dtype,
        "samples": found.profiles[0].samples,
        "blocks": found.names,
        "floor": found.floor.tolist(),
        "drowned": found.drowned(),
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


def render(found: DoseProfile, file: TextIO) -> None:
    """Print r per block and η as a table for people."""
    table = Table(title=f"Ratio r, computed in {found.dtype}")
    table.add_column("noise behind")
    drowned = found.drowned()
    for eta in found.magnitudes:
        table.add_column(
            f"η={eta:g}" + ("*" if eta in drowned else ""), justify="right"
        )
    for row, name in enumerate(found.names):
        table.add_row(
            name, *(f"{profile.ratio[row]:.3f}" for profile in found.profiles)
        )
    table.caption = f"rounding floor {found.floor[-1]:.1e}"
    if drowned:
        table.caption += "; * less than 5 times that"
    Console(file=file).print(table)
