"""The active recipe as it is saved: in the report, and beside the pruned model."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from llmcompressor.transformers.utils.helpers import infer_recipe_from_model_path
from loguru import logger
from pydantic_core import to_jsonable_python
from torch.nn import Module

from absorb_plugin.mistakes import in_one_line
from absorb_plugin.other_modifiers import WORKED_OUT, quantizes

__all__ = [
    "broken_off",
    "leave_recipe",
    "modifiers_before",
    "recipe_text",
    "say_whether_it_replays",
    "user_fields",
]

# Fields that llm-compressor fills in by itself.
HOUSEKEEPING = {"index", "group", "start", "end", "update"}


def user_fields(modifier: Modifier, **options: Any) -> dict[str, Any]:
    """
    The fields of a modifier that are its user's, not llm-compressor's own.

    :param options: of pydantic's `model_dump`
    """
    # what a modifier has worked out by itself may be a module
    own = {name for name in type(modifier).model_fields if name.endswith("_")}
    return modifier.model_dump(exclude=HOUSEKEEPING | own, **options)


def modifiers_before(modifier: Modifier) -> list[Modifier]:
    """
    Those before it in the active recipe. Call it in `on_initialize`: later the
    pipelines show one modifier at a time.
    """
    recipe = active_session().lifecycle.recipe.modifiers
    return recipe[: next(i for i, other in enumerate(recipe) if other is modifier)]


def recipe_text() -> str:
    """
    The active recipe as YAML, with the fields that the user has set. Call it in
    `on_initialize`, before `find_pruners`.
    """
    groups: dict[str, dict[str, Any]] = {}
    modifiers = active_session().lifecycle.recipe.modifiers
    names = _apart([("prune", modifier) for modifier in modifiers])
    for group, modifier in zip(names, modifiers, strict=True):
        fields = user_fields(modifier, exclude_unset=True)
        fields = to_jsonable_python(fields, fallback=str)
        groups.setdefault(f"{group}_modifiers", {})[type(modifier).__name__] = fields
    return yaml.safe_dump({"prune_stage": groups}, sort_keys=False, allow_unicode=True)


def broken_off() -> bool:
    """Whether a modifier of the active recipe has not come to its end."""
    recipe = active_session().lifecycle.recipe.modifiers
    if hasattr(Modifier, "on_calibration_end"):
        return any(not modifier.ended_ for modifier in recipe)
    # before 0.13 each says so by itself, and those without calibration do not
    return any(modifier.started_ and not modifier.ended_ for modifier in recipe)


def leave_recipe(modifier: Modifier, model: Module) -> None:
    """
    Take `modifier` out of the active recipe, so that the recipe.yaml saved with the
    model holds only what replays without this plugin; and mend what llm-compressor
    would save such that it does not replay: of two modifiers of one class in a group
    the first is lost, and a stage is renamed to what no loader reads where the model
    came with a recipe.yaml that has one of that name; and what a modifier has worked
    out by itself is not worked out again.

    :param modifier: ours
    :param model: that is pruned
    """
    recipe = active_session().lifecycle.recipe
    # a new list: the session is walking through the old one
    recipe.modifiers = [other for other in recipe.modifiers if other is not modifier]
    groups = [(other.group or recipe.stage, other) for other in recipe.modifiers]
    for (was, other), name in zip(groups, _apart(groups), strict=True):
        if name != was:
            other.group = name
    recipe.stage = _free(recipe.stage, _stages_of(model), "_stage")
    for other in recipe.modifiers:
        fields = WORKED_OUT.get(type(other).__name__)
        if fields is not None and getattr(other, fields[0]) is not None:
            setattr(other, fields[1], None)


def say_whether_it_replays(model: Module, mask_kept: bool) -> None:
    """
    Of the active recipe, once this plugin has left it.

    :param model: that is pruned
    :param mask_kept: whether the pipelines had this model's causal mask of us
    """
    try:
        yaml.safe_load(active_session().lifecycle.recipe.yaml())
    except Exception as error:  # it may hold anything, and the run is done
        said = in_one_line(error)
        logger.warning(
            f"Sparsities are set, but recipe.yaml does not load again ({said}). "
            "llm-compressor writes the defaults of some modifiers so, as the mappings "
            "of SmoothQuantModifier: write them out in the recipe, as lists"
        )
        return
    if mask_kept:
        logger.warning(
            "Sparsities are set, and recipe.yaml holds them. Replayed by "
            "llm-compressor alone it will make other weights of them, perhaps worse "
            'ones: its pipelines, but for pipeline="basic", calibrate this model '
            "without a causal mask, which was kept here (docs/compatibility.md)"
        )
    elif _quantized_before(model):
        logger.warning(
            "Sparsities are set, and recipe.yaml will hold them after the stages that "
            "the model came with, which quantise it. Replayed at once on what it was "
            "made of, this run's stages prune weights that were not rounded yet, and "
            "may end at others"
        )
    else:
        logger.info("Sparsities are set; recipe.yaml replays without absorb_plugin")


def _apart(modifiers: Sequence[tuple[str, Modifier]]) -> list[str]:
    """
    Names of groups that keep every modifier, and their order.

    :param modifiers: each with the name of its group
    :return: the same name, or with a number where the group has another of its class,
        or has ended before
    """
    names: list[str] = []
    kinds: set[type] = set()  # of the group at hand
    was = ""  # what the group at hand was called
    for name, modifier in modifiers:
        if names and name == was and type(modifier) not in kinds:
            names.append(names[-1])
        else:
            names.append(_free(name, names))
            kinds, was = set(), name
        kinds.add(type(modifier))
    return names


def _free(name: str, taken: Iterable[str], ending: str = "") -> str:
    """The name, or with the first number with which it is not among those taken."""
    taken, free, number = set(taken), name, 1
    while f"{free}{ending}" in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _quantized_before(model: Module) -> bool:
    """Whether the recipe.yaml that a model came with quantises."""
    if (path := _came_with(model)) is None:
        return False
    try:
        return any(map(quantizes, Recipe.create_instance(path).modifiers))
    except Exception as error:  # `_stages_of` has said that it is none
        logger.debug(f"the recipe.yaml that the model came with: {error}")
        return False


def _came_with(model: Module) -> str | None:
    """A recipe.yaml, found as llm-compressor finds it."""
    try:
        path = infer_recipe_from_model_path(getattr(model, "name_or_path", ""))
    except Exception as error:  # whatever the hub says of a name that it has not
        logger.debug(f"no recipe.yaml that the model came with: {error}")
        return None
    return None if path is None else str(path)


def _stages_of(model: Module) -> list[str]:
    """Of the recipe.yaml that a model came with."""
    path = _came_with(model)
    if path is None:
        return []
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:
        recipe = error
    if isinstance(recipe, dict):
        return list(map(str, recipe))
    told = f": {recipe}" if isinstance(recipe, Exception) else ""
    logger.warning(
        f"{path}, which the model came with, is no recipe{told}. llm-compressor adds "
        "to it when the model is saved, and may fail: remove it"
    )
    return []
