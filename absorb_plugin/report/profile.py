"""The profile of a run: every number that led to the allocation, as JSON."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from transformers import PreTrainedModel

from absorb_plugin.allocation import Allocation
from absorb_plugin.blocks import linear_parameters
from absorb_plugin.calibration import Batch, count_tokens, sample_key
from absorb_plugin.devices import dtype_of
from absorb_plugin.files import json_numbers
from absorb_plugin.groups import named
from absorb_plugin.pruners.adapter import PrunerAdapter
from absorb_plugin.pruners.recipe import user_fields
from absorb_plugin.report.folder import report_files
from absorb_plugin.report.page import render
from absorb_plugin.report.profile_charts import profile_charts
from absorb_plugin.report.warnings import TOLERANCE
from absorb_plugin.report.words import model_name, run_title
from absorb_plugin.report.write import write_or_warn
from absorb_plugin.search.descent import Step
from absorb_plugin.search.line_search import Round, SearchResult
from absorb_plugin.search.quality import Point, Quality, QuantizationCost
from absorb_plugin.signals.noise import NoiseProfile

if TYPE_CHECKING:
    from absorb_plugin.modifier import AbsorptionAllocationModifier

__all__ = ["SCHEMA_VERSION", "Report", "versions"]

SCHEMA_VERSION = 2
PACKAGES = ("absorb-plugin", "llmcompressor", "compressed-tensors", "transformers")


class Report:
    """
    Profile, figure and page of one pruning modifier's allocation.

    :param settings: the modifier that made it
    :param recipe: as the user wrote it, YAML
    :param pruner: the pruning modifier that it was made for
    :param batches: the calibration batches
    :param run: that it is of; the same in all reports of one run, and in no others
    :param number: which of the recipe's pruning modifiers it is; the first writes
        profile.json, the second profile_2.json
    """

    def __init__(
        self,
        settings: "AbsorptionAllocationModifier",
        recipe: str,
        model: PreTrainedModel,
        pruner: PrunerAdapter,
        allocation: Allocation,
        batches: Sequence[Batch],
        run: str,
        number: int = 0,
    ) -> None:
        self._settings, self._recipe, self._model = settings, recipe, model
        self._pruner, self._allocation = pruner, allocation
        self._calibration = calibration_entry(batches)
        self._run, self._number = run, number
        linears = allocation.blocks.linears()
        self._weights = {n: linear_parameters(linear) for n, linear in linears.items()}
        self._other_weights = allocation.blocks.other_weights()
        self._zeros: dict[str, int] = {}
        self._zeros_lost: float | None = None

    def measure_realised(self, zeros_lost: float | None = None) -> None:
        """
        Count the zeros that are left in every Linear.

        :param zeros_lost: share of the zeros that pruning made which others filled
        """
        self._zeros_lost = zeros_lost
        for name, linear in self._allocation.blocks.linears().items():
            self._zeros[name] = int((linear.weight.detach() == 0).sum())
        self._log()

    def profile(self) -> dict[str, Any]:
        """
        The profile as plain data, see docs/profile.md. NaN and what was not measured
        are None.
        """
        allocation = self._allocation
        return {
            "schema_version": SCHEMA_VERSION,
            "run": self._run,
            "model": model_entry(self._model),
            "pruner": self._pruner.name,
            "level": allocation.level,
            "calibration": self._calibration,
            "samples": [
                {"use": one.use, "samples": len(one.samples), "tokens": one.tokens}
                for one in allocation.samples
            ],
            "recipe": self._recipe,
            "command": command_line(),
            "settings": user_fields(self._settings),
            "noise": noise_entry(allocation),
            "search": search_entry(allocation.search),
            "confirmed": confirmed_entry(allocation, self._pruner.pruner.name),
            "quality": quality_entry(allocation.quality),
            "budget": allocation.budget.sparsity,
            "achieved": allocation.achieved(),
            "realised": self._realised(list(self._weights)),
            "zeros_lost": self._zeros_lost,
            "other_weights": self._other_weights,
            "unseen_linears": None
            if allocation.unseen is None
            else list(allocation.unseen),
            "blocks": self._blocks(),
            "versions": versions(),
        }

    def _realised(self, names: Sequence[str]) -> float | None:
        """Share of zeros in the Linears named, None before they were counted."""
        if not self._zeros:
            return None
        weights = sum(self._weights[name] for name in names)
        return sum(self._zeros[name] for name in names) / weights

    def _blocks(self) -> list[dict[str, Any]]:
        """What was decided, measured and counted of every block and its Linears."""
        allocation, linears = self._allocation, self._linears()
        means = {
            "base_sparsity": allocation.block_means(allocation.base.sparsity),
            "sparsity": allocation.block_means(allocation.sparsity),
        }
        delta = allocation.direction
        deltas = None if delta is None else allocation.block_means(delta)
        entries = []
        for row, index in enumerate(allocation.blocks.prunable):
            block = allocation.blocks.blocks[index]
            full = {name: block.full_name(name) for name in block.linears}
            entries.append(
                {"name": block.name, "parameters": block.parameters}
                | {"base_metric": float(allocation.base.metric[row])}
                | {key: float(values[row]) for key, values in means.items()}
                | {"direction": None if deltas is None else float(deltas[row])}
                | noise_row(allocation.noise, row)
                | {"realised_sparsity": self._realised(list(full.values()))}
                | {"linears": {name: linears[long] for name, long in full.items()}}
            )
        return entries

    def _linears(self) -> dict[str, dict[str, Any]]:
        """Full name of every prunable Linear -> what is known of it."""
        allocation = self._allocation
        base = named(allocation.blocks, allocation.base.sparsity)
        targets = allocation.linear_sparsities()
        metrics = allocation.base.linear_metrics
        return {
            name: {
                "parameters": weights,
                "base_sparsity": base[name],
                "sparsity": targets[name],
                "realised_sparsity": self._realised([name]),
            }
            | ({"metric": float(metrics[name])} if name in metrics else {})
            for name, weights in self._weights.items()
        }

    def write(self, directory: str | None) -> None:
        """
        Write profile.json, profile.png and report.html, each whole or not at all. What
        cannot be written or drawn is a warning.
        """
        if directory is None:
            return
        profile = self.profile()
        numbers, picture, page = report_files(Path(directory), self._number)
        write_or_warn(numbers, lambda: as_json(profile))
        write_or_warn(picture, lambda: draw_profile(profile))
        write_or_warn(page, lambda: render(profile, numbers.stem).encode())

    def _log(self) -> None:
        profile = self.profile()
        blocks = [block["realised_sparsity"] for block in profile["blocks"]]
        realised, wanted = profile["realised"], profile["budget"]
        told = (
            f"{self._pruner.name}: sparsity {realised:.4f} realised, {wanted:.4f} "
            f"asked for; blocks {min(blocks):.3f} … {max(blocks):.3f}"
        )
        if abs(realised - wanted) <= TOLERANCE + self._rounding():
            logger.info(told)
        elif realised == 0.0:
            logger.warning(
                f"{told}. It pruned nothing: did it see the calibration data? With "
                "pipeline: datafree it does not, and of models that llm-compressor "
                "cannot trace it may take pipeline: basic"
            )
        else:
            logger.warning(
                f"{told}. Look for another modifier of the recipe that prunes or "
                "changes the same Linears, and for Linears that saw no token"
            )

    def _rounding(self) -> float:
        """A weight in every row, by which pruners fall short of a share of it."""
        linears = self._allocation.blocks.linears().values()
        rows = sum(linear.out_features for linear in linears)
        return rows / sum(self._weights.values())


def as_json(profile: Mapping[str, Any]) -> bytes:
    return json.dumps(profile, indent=1, allow_nan=False).encode()


def draw_profile(profile: Mapping[str, Any]) -> bytes:
    """:return: a PNG"""
    from absorb_plugin.report.figure import draw  # matplotlib, for a report alone

    return draw(profile_charts(profile), f"{model_name(profile)}: {run_title(profile)}")


def model_entry(model: PreTrainedModel) -> dict[str, str]:
    return {
        "class": type(model).__name__,
        "name_or_path": getattr(model, "name_or_path", ""),
        "dtype": str(dtype_of(model)).removeprefix("torch."),
    }


def calibration_entry(batches: Sequence[Batch]) -> dict[str, int]:
    return {
        "samples": sum(len(batch["input_ids"]) for batch in batches),
        "tokens": sum(map(count_tokens, batches)),
        "longest": max(batch["input_ids"].shape[-1] for batch in batches),
    }


def versions() -> dict[str, str]:
    return {"torch": torch.__version__} | {name: version(name) for name in PACKAGES}


def noise_entry(allocation: Allocation) -> dict[str, Any] | None:
    """What holds for the noise probe as a whole."""
    noise, settings = allocation.noise, allocation.noise_settings
    if noise is None:
        return None
    names = [block.name for block in allocation.blocks.blocks]
    return {
        "magnitude": settings.magnitude,
        "dtype": settings.dtype,
        "floor": json_numbers(noise.floor),
        "seed": settings.seed,
        "samples": noise.samples,
        "tokens": noise.tokens,
        "spared_positions": {names[i]: found for i, found in noise.spared.items()},
    }


def noise_row(noise: NoiseProfile | None, row: int) -> dict[str, Any]:
    """What the noise probe found of one block."""
    keys = ("drift", "realignment", "ratio", "ratio_error")
    if noise is None:
        return dict.fromkeys(keys)
    return {
        "drift": json_numbers(noise.drift[row]),
        "realignment": json_numbers(noise.realignment[row]),
        "ratio": json_number(noise.ratio[row]),
        "ratio_error": json_number(noise.ratio_error[row]),
    }


def json_number(value: float) -> float | None:
    return json_numbers([value])[0]


def search_entry(search: SearchResult | None) -> dict[str, Any] | None:
    if search is None:
        return None
    return {
        "start": search.start,
        "base_loss": json_number(search.base_loss),
        "uniform_loss": json_number(search.uniform_loss),
        "loss": json_number(search.loss),
        "rounds": [round_entry(entry) for entry in search.rounds],
        "steps": [step_entry(step) for step in search.steps],
        "judged": [
            {"steps": steps, "loss": json_number(loss)}
            for steps, loss in search.judged.items()
        ],
        "taken": search.taken,
    }


def quality_entry(quality: Quality | None) -> dict[str, Any] | None:
    if quality is None:
        return None
    # of several allocations of a budget the best
    best: dict[float, Point] = {}
    for point in sorted(quality.points, key=lambda point: -point.cautious):
        best[point.sparsity] = point
    return {
        "max_loss_increase": quality.bound,
        "found": quality.found.sparsity,
        "curve": [
            {
                "sparsity": point.sparsity,
                "loss_increase": json_number(point.increase),
                "standard_error": json_number(point.error),
                "allocation": point.name,
            }
            for _, point in sorted(best.items())
        ],
        "quantization": quantization_entry(quality.quantization),
    }


def quantization_entry(cost: QuantizationCost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    return {
        "modifiers": list(cost.modifiers),
        "loss_increase": json_number(cost.increase),
        "standard_error": json_number(cost.error),
    }


def step_entry(step: Step) -> dict[str, Any]:
    return {
        "loss": json_number(step.loss),
        "length": step.length,
        "largest": step.largest,
    }


def round_entry(entry: Round) -> dict[str, Any]:
    return {
        "direction": entry.direction.tolist(),
        "strengths": entry.strengths,
        "losses": json_numbers(entry.losses),
        "chosen": entry.chosen,
    }


def confirmed_entry(allocation: Allocation, judge: str) -> dict[str, Any] | None:
    """
    What the pruner's own arithmetic made of the outcome, and of others.

    :param judge: name of the pruner
    """
    confirmed = allocation.confirmed
    if confirmed is None:
        return None
    keys = {
        one.use: {sample_key(sample) for sample in one.samples}
        for one in allocation.samples
    }
    return {
        "judge": judge,
        "losses": {n: json_number(loss) for n, loss in confirmed.losses.items()},
        "chosen": confirmed.chosen,
        "gain": json_number(confirmed.gain),
        "standard_error": json_number(confirmed.standard_error),
        "anew": confirmed.anew,
        # a bound on the loss is kept on the samples that confirm
        "chose_nothing": allocation.quality is None
        and not confirmed.anew
        and keys["confirm"].isdisjoint(keys["search"]),
    }


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
