"""A thin wrapper over llm-compressor's `oneshot`, for the command line and the demo."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from transformers import PreTrainedModel, set_seed

import absorb_plugin  # registers the modifier that a recipe may name
from absorb_plugin.files import check_writable

__all__ = ["keep_profiles", "load_recipe", "prune"]


def load_recipe(path: Path) -> Recipe:
    """
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it cannot be parsed, or holds no modifier
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    try:
        recipe = Recipe.create_instance(str(path))
    except Exception as error:  # YAML, pydantic and factory errors alike
        raise ValueError(f"cannot use recipe {path}: {error}") from error
    if not recipe.modifiers:
        # llm-compressor ignores every key that does not fit the pattern
        raise ValueError(
            f"recipe {path} holds no modifier. Its shape must be "
            "`NAME_stage:` > `NAME_modifiers:` > class name > fields"
        )
    return recipe


def keep_profiles(recipe: Recipe, directory: Path) -> None:
    """
    Set `profile_cache` in the recipe.

    :raises ValueError: if no modifier of the recipe has it, or the directory cannot be
        written to
    """
    ours = [
        modifier
        for modifier in recipe.modifiers
        if isinstance(modifier, absorb_plugin.AbsorptionAllocationModifier)
    ]
    if not ours:
        raise ValueError(
            "profile_cache is for recipes with an AbsorptionAllocationModifier, and "
            "this one has none: leave it out"
        )
    check_writable("profile_cache", str(directory))
    for modifier in ours:
        modifier.profile_cache = str(directory)


def prune(
    model: str | PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe | Sequence[Modifier],
    samples: Dataset,
    *,
    pipeline: str = "independent",
    dtype: str = "auto",
    seed: int = 0,
    output_dir: Path | None = None,
) -> PreTrainedModel:
    """
    Run `oneshot` on samples that are already tokenised, in their order.

    :param model: directory, hub id or loaded model
    :param tokenizer: the model's tokenizer, saved beside it
    :param recipe: parsed recipe, or modifiers
    :param samples: rows of `input_ids` and `attention_mask`, all equally long
    :param pipeline: "independent", "sequential" or "basic"
    :param dtype: dtype to load the model in, "auto" as it was saved
    :param seed: of every random number generator
    :param output_dir: where to save model, tokenizer and recipe.yaml, or None
    :return: the pruned model
    """
    # Else llm-compressor does the same and warns of it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_seed(seed)
    return oneshot(
        model=model,
        tokenizer=tokenizer,
        precision=dtype,
        recipe=recipe if isinstance(recipe, Recipe) else list(recipe),
        dataset=samples,
        num_calibration_samples=len(samples),
        max_seq_length=len(samples[0]["input_ids"]),
        shuffle_calibration_samples=False,
        pipeline=pipeline,
        output_dir=None if output_dir is None else str(output_dir),
    )
