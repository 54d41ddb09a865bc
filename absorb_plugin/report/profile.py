"""The profile of a run: every number that led to the allocation, as JSON."""

import json
import math
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from transformers import PreTrainedModel

from absorb_plugin.allocation import Allocation
from absorb_plugin.blocks import linear_parameters
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.peers import Peer
from absorb_plugin.report.figure import draw

if TYPE_CHECKING:
    from absorb_plugin.modifier import AbsorptionAllocationModifier

__all__ = ["SCHEMA_VERSION", "Report"]

SCHEMA_VERSION = 1
PACKAGES = ("absorb-plugin", "llmcompressor", "compressed-tensors", "transformers")


class Report:
    """
    Profile and figure of one pruning modifier's allocation.

    :param settings: the modifier that made it
    :param peer: the pruning modifier that it was made for
    :param batches: the calibration batches
    :param number: which of the recipe's pruning modifiers it is; the first writes
        profile.json, the second profile_2.json
    """

    def __init__(
        self,
        settings: "AbsorptionAllocationModifier",
        model: PreTrainedModel,
        peer: Peer,
        allocation: Allocation,
        batches: Sequence[Batch],
        number: int = 0,
    ) -> None:
        self._settings, self._model = settings, model
        self._peer, self._allocation = peer, allocation
        self._samples = sum(len(batch["input_ids"]) for batch in batches)
        self._tokens = sum(int(token_mask(batch).sum()) for batch in batches)
        self._name = "profile" if number == 0 else f"profile_{number + 1}"
        self._realised: dict[str, float] = {}

    def measure_realised(self) -> None:
        """Count the zeros that the pruning modifier left in every block."""
        for index in self._allocation.blocks.prunable:
            block = self._allocation.blocks.blocks[index]
            zeros = sum(
                int((linear.weight.detach() == 0).sum())
                for linear in block.linears.values()
            )
            self._realised[block.name] = zeros / block.parameters
        self._log()

    def profile(self) -> dict[str, Any]:
        """
        The profile as plain data, see docs/profile.md. NaN and what was not measured
        are None.
        """
        allocation, settings = self._allocation, self._settings
        absorption, search = allocation.absorption, allocation.search
        targets = allocation.linear_sparsities()
        sparsities = allocation.block_sparsities()
        parameters = allocation.blocks.parameters
        realised = None
        if self._realised:
            counts = list(self._realised.values()) @ parameters
            realised = float(counts / parameters.sum())
        profile: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model": {
                "class": type(self._model).__name__,
                "name_or_path": getattr(self._model, "name_or_path", ""),
                "dtype": str(self._model.dtype).removeprefix("torch."),
            },
            "pruner": self._peer.name,
            "calibration": {"samples": self._samples, "tokens": self._tokens},
            "settings": settings.model_dump(
                exclude={"index", "group", "start", "end", "update"}
                | {name for name in type(settings).model_fields if name.endswith("_")}
            ),
            "noise": None,
            "search": None,
            "budget": allocation.budget,
            "achieved": allocation.achieved(),
            "realised": realised,
            "unseen_linears": None
            if allocation.unseen is None
            else list(allocation.unseen),
            "blocks": [],
            "versions": {"torch": torch.__version__}
            | {package: version(package) for package in PACKAGES},
        }
        if absorption is not None:
            profile["noise"] = {
                "magnitude": settings.noise_magnitude,
                "seed": settings.noise_seed,
                "samples": absorption.samples,
                "tokens": absorption.tokens,
                "spared_positions": {
                    allocation.blocks.blocks[index].name: positions
                    for index, positions in absorption.spared.items()
                },
            }
        if search is not None:
            profile["search"] = {
                "start": search.start,
                "base_loss": _plain([search.base_loss])[0],
                "uniform_loss": _plain([search.uniform_loss])[0],
                "loss": _plain([search.loss])[0],
                "rounds": [
                    {
                        "direction": entry.direction.tolist(),
                        "strengths": entry.strengths,
                        "losses": _plain(entry.losses),
                        "chosen": entry.chosen,
                    }
                    for entry in search.rounds
                ],
            }
        for row, index in enumerate(allocation.blocks.prunable):
            block = allocation.blocks.blocks[index]
            entry: dict[str, Any] = {
                "name": block.name,
                "parameters": block.parameters,
                "metric": float(allocation.base.metric[row]),
                "base_sparsity": float(allocation.base.sparsity[row]),
                "drift": None,
                "realignment": None,
                "ratio": None,
                "ratio_error": None,
                "direction": float(allocation.direction[row]),
                "sparsity": float(sparsities[row]),
                "realised_sparsity": self._realised.get(block.name),
                "linears": {},
            }
            if absorption is not None:
                entry |= {
                    "drift": _plain(absorption.drift[row]),
                    "realignment": _plain(absorption.realignment[row]),
                    "ratio": float(absorption.ratio[row]),
                    "ratio_error": _plain([absorption.ratio_error[row]])[0],
                }
            for name, linear in block.linears.items():
                full = block.full_name(name)
                entry["linears"][name] = {
                    "parameters": linear_parameters(linear),
                    "sparsity": targets[full],
                }
                if full in allocation.base.linear_metrics:
                    metric = float(allocation.base.linear_metrics[full])
                    entry["linears"][name]["metric"] = metric
            profile["blocks"].append(entry)
        return profile

    def write(self, directory: str | None) -> None:
        """Write NAME.json and NAME.png, whole or not at all."""
        if directory is None:
            return
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        profile = self.profile()
        text = json.dumps(profile, indent=1, allow_nan=False)
        _replace(folder / f"{self._name}.json", text.encode())
        _replace(folder / f"{self._name}.png", draw(profile))

    def _log(self) -> None:
        profile = self.profile()
        logger.info(
            f"{self._peer.name}: sparsity {profile['realised']:.4f} realised, "
            f"{profile['budget']:.4f} asked for; blocks "
            f"{min(self._realised.values()):.3f} … {max(self._realised.values()):.3f}"
        )


def _plain(values: Any) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def _replace(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: no reader sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
