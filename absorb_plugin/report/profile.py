"""The profile of a run: every number that led to the allocation, as JSON."""

import json
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from transformers import PreTrainedModel

from absorb_plugin.allocate import Allocation
from absorb_plugin.blocks import linear_parameters
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.devices import dtype_of
from absorb_plugin.files import json_numbers, replace_file
from absorb_plugin.pruners.adapter import PrunerAdapter, user_fields
from absorb_plugin.report.figure import draw
from absorb_plugin.report.page import render

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
        recipe: str,
        model: PreTrainedModel,
        peer: PrunerAdapter,
        allocation: Allocation,
        batches: Sequence[Batch],
        number: int = 0,
    ) -> None:
        self._settings, self._recipe, self._model = settings, recipe, model
        self._peer, self._allocation = peer, allocation
        self._samples = sum(len(batch["input_ids"]) for batch in batches)
        self._tokens = sum(int(token_mask(batch).sum()) for batch in batches)
        self._longest = max(batch["input_ids"].shape[-1] for batch in batches)
        self._suffix = "" if number == 0 else f"_{number + 1}"
        self._realised: dict[str, float] = {}
        self._linear_realised: dict[str, float] = {}

    def measure_realised(self) -> None:
        """Count the zeros that the pruning modifier left in every block."""
        for index in self._allocation.blocks.prunable:
            block = self._allocation.blocks.blocks[index]
            zeros = {
                name: int((linear.weight.detach() == 0).sum())
                for name, linear in block.linears.items()
            }
            self._realised[block.name] = sum(zeros.values()) / block.parameters
            for name, count in zeros.items():
                share = count / linear_parameters(block.linears[name])
                self._linear_realised[block.full_name(name)] = share
        self._log()

    def profile(self) -> dict[str, Any]:
        """
        The profile as plain data, see docs/profile.md. NaN and what was not measured
        are None.
        """
        allocation, settings = self._allocation, self._settings
        absorption, search = allocation.noise, allocation.search
        targets = allocation.linear_sparsities()
        sparsities = allocation.block_means(allocation.sparsity)
        bases = allocation.block_means(allocation.base.sparsity)
        directions = allocation.block_means(allocation.direction)
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
                "dtype": str(dtype_of(self._model)).removeprefix("torch."),
            },
            "pruner": self._peer.name,
            "calibration": {
                "samples": self._samples,
                "tokens": self._tokens,
                "longest": self._longest,
            },
            "recipe": self._recipe,
            "command": command_line(),
            "settings": user_fields(settings),
            "noise": None,
            "search": None,
            "confirmed": None,
            "samples": [
                {"use": one.use, "samples": len(one.samples), "tokens": one.tokens}
                for one in allocation.samples
            ],
            "level": allocation.level,
            "budget": allocation.budget.sparsity,
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
            noise = allocation.noise_settings
            profile["noise"] = {
                "magnitude": noise.magnitude,
                "dtype": noise.dtype,
                "floor": json_numbers(absorption.floor),
                "seed": noise.seed,
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
                "base_loss": json_numbers([search.base_loss])[0],
                "uniform_loss": json_numbers([search.uniform_loss])[0],
                "loss": json_numbers([search.loss])[0],
                "rounds": [
                    {
                        "direction": entry.direction.tolist(),
                        "strengths": entry.strengths,
                        "losses": json_numbers(entry.losses),
                        "chosen": entry.chosen,
                    }
                    for entry in search.rounds
                ],
            }
        if (confirmed := allocation.confirmed) is not None:
            profile["confirmed"] = {
                "judge": self._peer.pruner.name,
                "losses": dict(
                    zip(
                        confirmed.losses,
                        json_numbers(confirmed.losses.values()),
                        strict=True,
                    )
                ),
                "chosen": confirmed.chosen,
                "gain": json_numbers([confirmed.gain])[0],
                "standard_error": json_numbers([confirmed.standard_error])[0],
            }
        for row, index in enumerate(allocation.blocks.prunable):
            block = allocation.blocks.blocks[index]
            entry: dict[str, Any] = {
                "name": block.name,
                "parameters": block.parameters,
                "base_metric": float(allocation.base.metric[row]),
                "base_sparsity": float(bases[row]),
                "drift": None,
                "realignment": None,
                "ratio": None,
                "ratio_error": None,
                "direction": float(directions[row]),
                "sparsity": float(sparsities[row]),
                "realised_sparsity": self._realised.get(block.name),
                "linears": {},
            }
            if absorption is not None:
                entry |= {
                    "drift": json_numbers(absorption.drift[row]),
                    "realignment": json_numbers(absorption.realignment[row]),
                    "ratio": float(absorption.ratio[row]),
                    "ratio_error": json_numbers([absorption.ratio_error[row]])[0],
                }
            for name, linear in block.linears.items():
                full = block.full_name(name)
                entry["linears"][name] = {
                    "parameters": linear_parameters(linear),
                    "sparsity": targets[full],
                    "realised_sparsity": self._linear_realised.get(full),
                }
                if full in allocation.base.linear_metrics:
                    metric = float(allocation.base.linear_metrics[full])
                    entry["linears"][name]["metric"] = metric
            profile["blocks"].append(entry)
        return profile

    def write(self, directory: str | None) -> None:
        """
        Write profile.json, profile.png and report.html, whole or not at all. Where that
        fails, a warning: hours of pruning must not be lost for want of room for a
        report.
        """
        if directory is None:
            return
        folder = Path(directory)
        profile = self.profile()
        text = json.dumps(profile, indent=1, allow_nan=False)
        name = f"profile{self._suffix}"
        try:
            replace_file(folder / f"{name}.json", text.encode())
            replace_file(folder / f"{name}.png", draw(profile))
            page = render(profile, name).encode()
            replace_file(folder / f"report{self._suffix}.html", page)
        except OSError as error:
            logger.warning(
                f"report_dir: the report could not be written to {directory} "
                f"({error.strerror or error}); the run goes on without it. Make room, "
                "or name another directory"
            )

    def _log(self) -> None:
        profile = self.profile()
        logger.info(
            f"{self._peer.name}: sparsity {profile['realised']:.4f} realised, "
            f"{profile['budget']:.4f} asked for; blocks "
            f"{min(self._realised.values()):.3f} … {max(self._realised.values()):.3f}"
        )


def command_line() -> str | None:
    """
    The command, if it is ours. The arguments of somebody else's script are not for us
    to publish.
    """
    main = getattr(sys.modules["__main__"], "__spec__", None)
    by_module = main is not None and main.name == "absorb_plugin.cli.__main__"
    if by_module or Path(sys.argv[0]).name == "absorb":
        return shlex.join(["absorb", *sys.argv[1:]])
    return None
