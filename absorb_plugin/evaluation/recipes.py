"""Recipes as text: from a few wishes, or from an allocation that is known."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.mistakes import in_words
from absorb_plugin.pruners import PRUNERS
from absorb_plugin.search.budget import check_budget
from absorb_plugin.settings import AllocationSettings

__all__ = ["GROUP_SIZES", "QUANTIZATIONS", "RecipeWishes", "group_size"]
__all__ += ["is_native_recipe", "native_recipe"]

# Name -> scheme of llm-compressor. All of them keep zeros.
QUANTIZATIONS = {"w8a8": "W8A8", "w4a16": "W4A16", "fp8": "FP8_DYNAMIC"}
# Columns that share a scale in 4 bits, the scheme's own size first.
GROUP_SIZES = (128, 64, 32)
# The largest budget where only a quality is asked for: the loss is the nearer bound.
LARGEST = 0.9


@dataclass(frozen=True)
class RecipeWishes:
    """
    :param sparsity: the budget, or the largest one where `max_loss_increase` is given
    :param max_loss_increase: as in `AbsorptionAllocationModifier`
    :param pruner: name of a pruner
    :param allocator: name of a base allocator
    :param effort: as in `AbsorptionAllocationModifier`
    :param quantize: one of QUANTIZATIONS, or None
    :param ignore: Linears to leave dense, as in `AbsorptionAllocationModifier`
    """

    sparsity: float | None = None
    max_loss_increase: float | None = None
    pruner: str = "sparsegpt"
    allocator: str = "owl"
    effort: str = "standard"
    quantize: str | None = None
    ignore: Sequence[str] = ()

    def check(self) -> None:
        """
        :raises ValueError: if neither a sparsity nor a quality is asked for, or one
            that cannot be
        """
        if self.sparsity is None and self.max_loss_increase is None:
            raise ValueError("neither sparsity nor max_loss_increase is given")
        try:
            settings = AllocationSettings(**self._fields())
        except ValidationError as error:
            fields = AllocationSettings.model_fields
            raise ValueError(in_words(error, fields)) from error
        settings.base_allocator()
        check_budget(self._budget(), settings.highest_sparsity())

    def text(self, model: PreTrainedModel) -> str:
        """
        :param model: that will be pruned, with or without its weights
        :return: YAML
        :raises ValueError: if its Linears cannot be quantised so
        """
        head = _head(model)
        fields = {
            "sparsity": self._budget(),
            "targets": ["Linear"],
            "ignore": [f"re:.*{re.escape(head)}"] if head else [],
        }
        stage: dict[str, Any] = {
            "prune_modifiers": {
                "AbsorptionAllocationModifier": self._fields(),
                PRUNERS[self.pruner].modifier.__name__: fields,
            }
        }
        if self.quantize is not None:
            linears, blocks = _linears(model), find_blocks(model)
            # what names within the decoder blocks begin with
            homes = tuple(f"{block.name}." for block in blocks.blocks)
            kept = {x for x in linears if x.startswith(homes)} - blocks.routers
            wide = {name: x.in_features for name, x in linears.items() if name in kept}
            ignore = dict.fromkeys(
                _one(x, kept) if x.startswith(homes) else _pattern(x, kept)
                for x in linears
                if x not in kept
            )
            scheme = self._scheme(wide | _widths_of_experts(model, homes))
            fields = {**scheme, "ignore": list(ignore)}
            stage["quantize_modifiers"] = {"QuantizationModifier": fields}
        return _yaml(stage)

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"allocator": self.allocator, "effort": self.effort}
        if self.ignore:
            fields["ignore"] = list(self.ignore)
        if self.max_loss_increase is None:
            return fields
        return {**fields, "max_loss_increase": self.max_loss_increase}

    def _budget(self) -> float:
        return LARGEST if self.sparsity is None else self.sparsity

    def _scheme(self, widths: Mapping[str, int]) -> dict[str, Any]:
        assert self.quantize is not None
        scheme = {"scheme": QUANTIZATIONS[self.quantize], "targets": ["Linear"]}
        if self.quantize != "w4a16":
            return scheme
        size = group_size(widths)
        if size == GROUP_SIZES[0]:
            return scheme
        weights = {"num_bits": 4, "type": "int", "strategy": "group"}
        group = {"targets": ["Linear"], "weights": {**weights, "group_size": size}}
        return {"config_groups": {"group_0": group}}


def native_recipe(sparsities: Mapping[str, float], pruner: str) -> str:
    """
    A recipe that llm-compressor follows without this package.

    :param sparsities: full name of a Linear -> its sparsity, in the model's order
    :param pruner: name of a pruner
    :return: YAML
    """
    fields = {"sparsity": list(sparsities.values()), "targets": list(sparsities)}
    modifier = PRUNERS[pruner].modifier.__name__
    return _yaml({"prune_modifiers": {modifier: fields}})


def is_native_recipe(content: bytes) -> bool:
    """Whether `native_recipe` may have written it."""
    try:
        (fields,) = yaml.safe_load(content)["prune_stage"]["prune_modifiers"].values()
        targets, sparsities = fields["targets"], fields["sparsity"]
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError):
        return False
    return isinstance(targets, list) and isinstance(sparsities, list)


def _yaml(stage: Mapping[str, Any]) -> str:
    return yaml.safe_dump({"prune_stage": stage}, sort_keys=False, allow_unicode=True)


def _head(model: PreTrainedModel) -> str | None:
    """Full name of the output head."""
    head = model.get_output_embeddings()
    return next((name for name, x in model.named_modules() if x is head), None)


def _linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _widths_of_experts(
    model: PreTrainedModel, homes: tuple[str, ...]
) -> dict[str, int]:
    """
    Of experts that are one parameter yet, and Linears when they are quantised: which of
    two sides is their columns differs from model to model, so both.
    """
    return {
        f"{name}, side {side}": size
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and name.startswith(homes)
        for side, size in enumerate(parameter.shape[1:], start=1)
    }


def _pattern(name: str, kept: Collection[str]) -> str:
    """
    An entry of `ignore` for a Linear outside the decoder blocks, and as much around it
    as holds none of `kept`.
    """
    parts = name.split(".")
    for count in range(1, len(parts)):
        outer = ".".join(parts[:count])
        if not any(other.startswith(f"{outer}.") for other in kept):
            return f"re:{re.escape(outer)}\\."
    return _one(name, kept)


def _one(name: str, kept: Collection[str]) -> str:
    """An entry of `ignore` for a Linear, and its like in other blocks if not `kept`."""
    parts = name.split(".")
    words = (r"\d+" if x.isdigit() else re.escape(x) for x in parts)
    pattern = r"\.".join(words) + "$"
    alike = any(map(str.isdigit, parts))
    if alike and not any(re.match(pattern, other) for other in kept):
        return f"re:{pattern}"
    return name


def group_size(widths: Mapping[str, int]) -> int:
    """
    Of W4A16, the largest that divides all widths.

    :param widths: name of a Linear -> its columns
    :raises ValueError: if none does
    """
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths.values()):
            return size
    name, width = next(x for x in widths.items() if x[1] % GROUP_SIZES[-1])
    raise ValueError(
        f"quantize='w4a16': {name} has {width} columns, which groups of "
        f"{GROUP_SIZES[-1]} do not divide. Take w8a8 or fp8"
    )
