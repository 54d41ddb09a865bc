"""A thin wrapper over llm-compressor's `oneshot`, for the command line and the demo."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from compressed_tensors.quantization import QuantizationConfig
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from pydantic import ValidationError
from transformers import PreTrainedModel, set_seed

import absorb_plugin  # registers the modifier that a recipe may name
from absorb_plugin.evaluation.recipes import RecipeWishes
from absorb_plugin.files import check_writable
from absorb_plugin.mistakes import check_patterns, in_words
from absorb_plugin.other_modifiers import quantizes
from absorb_plugin.pruners.experts import check_packing, name_as_stored
from absorb_plugin.settings import expanded

__all__ = [
    "check_caches",
    "keep_profiles",
    "least_bits",
    "load_recipe",
    "ours",
    "parse_recipe",
    "prune",
    "quantization_of",
    "stage_reports",
]

SHAPE = "Its shape must be `NAME_stage:` > `NAME_modifiers:` > class name > fields"
# Where the recipe is in a .md file, as llm-compressor looks for it.
FRONT_MATTER = re.compile(
    r"^\s*(?:---|\+\+\+)(.*?)(?:---|\+\+\+)", re.DOTALL | re.MULTILINE
)

# Tag of `<<`, which may be there several times.
MERGE = "tag:yaml.org,2002:merge"


def load_recipe(path: Path) -> Recipe:
    """
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it cannot be parsed, holds no modifier, or holds a key twice
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    try:
        _check_keys(path)
        return parse_recipe(str(path))
    except ValueError as error:
        cause = _mistake(path) or str(error)
        raise ValueError(f"cannot use recipe {path}: {cause}") from error


def parse_recipe(text: str) -> Recipe:
    """
    :param text: YAML, or the path of a file
    :raises ValueError: if it cannot be parsed, or holds no modifier
    """
    try:
        recipe = Recipe.create_instance(text)
    except ValidationError as error:
        fields = in_words(error, _fields_of(error.title))
        raise ValueError(f"{error.title}: {fields}") from error
    except Exception as error:  # YAML, pydantic and factory errors alike
        raise ValueError(str(error)) from error
    if not recipe.modifiers:
        # llm-compressor ignores every key that does not fit the pattern
        raise ValueError(f"it holds no modifier. {SHAPE}")
    for modifier in recipe.modifiers:
        for field in ("targets", "ignore"):
            patterns = getattr(modifier, field, None)
            if isinstance(patterns, list):
                check_patterns(f"{type(modifier).__name__}: {field}", patterns)
    for modifier in ours(recipe):
        modifier.base_allocator()
    return recipe


def least_bits(recipe: Recipe) -> int | None:
    """The fewest bits that it quantises weights to; None if it quantises none."""
    bits = []
    for modifier in filter(quantizes, recipe.modifiers):
        # of a copy: llm-compressor fills in what it finds
        found = modifier.model_copy(deep=True).resolve_quantization_config()
        weights = [group.weights for group in found.config_groups.values()]
        bits += [one.num_bits for one in weights if one is not None]
    return min(bits, default=None)


def quantization_of(model: PreTrainedModel, quantize: str) -> QuantizationConfig:
    """
    What `absorb prune --quantize` does to a model.

    :param model: with or without its weights
    :raises ValueError: if its Linears cannot be quantised so
    """
    text = RecipeWishes(sparsity=0.0, quantize=quantize).text(model)
    return parse_recipe(text).modifiers[-1].resolve_quantization_config()


def _recipe_text(path: Path) -> tuple[str, int]:
    """
    :return: what llm-compressor takes for the recipe, and the lines before it
    :raises UnicodeDecodeError: if it is no UTF-8
    """
    text = path.read_text(encoding="utf-8")
    found = FRONT_MATTER.search(text) if path.suffix.lower() == ".md" else None
    return (found[1], text.count("\n", 0, found.start(1))) if found else (text, 0)


def _check_keys(path: Path) -> None:
    """:raises ValueError: if a key is there twice: YAML would drop the first of them"""
    try:
        text, before = _recipe_text(path)
        # YAML takes no tabs, and JSON, which is parsed as YAML here, does
        recipe = yaml.compose(text.replace("\t", " "), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return  # llm-compressor says what is wrong with it
    if (found := _twice(recipe, [], set())) is not None:
        within, key, (first, second) = found
        lines = f"line {before + first}"
        if first != second:
            lines = f"lines {before + first} and {before + second}"
        raise ValueError(
            f"{' > '.join(within) or 'the recipe'} has {key!r} twice, in {lines}, and "
            f"YAML keeps the last alone. {_instead(within)}"
        )


def _twice(
    node: yaml.Node | None, within: list[str], seen: set[int]
) -> tuple[list[str], str, tuple[int, int]] | None:
    """
    The first key that is there twice: what it is in, the key, and its lines. Outside
    stages nothing counts, for llm-compressor does not look there.

    :param seen: nodes that were looked at: an anchor has one for all its places
    """
    if node is None or id(node) in seen:
        return None
    seen.add(id(node))
    lines: dict[tuple[str, str], int] = {}
    for key, name, value in _entries(node):
        if not within and not name.endswith("_stage"):
            continue
        if key is not None:
            line = key.start_mark.line + 1
            if (key.tag, name) in lines:
                return within, name, (lines[key.tag, name], line)
            lines[key.tag, name] = line
        if (found := _twice(value, [*within, name], seen)) is not None:
            return found
    return None


def _entries(node: yaml.Node) -> Iterator[tuple[yaml.Node | None, str, yaml.Node]]:
    """Key, its text, and value; the key is None where it may be there twice."""
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield None, str(index), value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            is_name = isinstance(key, yaml.ScalarNode) and key.tag != MERGE
            yield key if is_name else None, str(key.value), value


def _instead(within: Sequence[str]) -> str:
    if len(within) == 2 and within[1].endswith("_modifiers"):
        group = within[1].removesuffix("_modifiers")
        return f"Put the second one into a group of its own, {group}_2_modifiers:"
    if len(within) < 2:
        return "Give the second one another name"
    return "Remove one of the two"


def _fields_of(name: str) -> list[str]:
    """Of a class of modifiers that llm-compressor has imported."""
    kinds: list[type[Modifier]] = [Modifier]
    for kind in kinds:
        if kind.__name__ == name:
            return list(kind.model_fields)
        kinds += kind.__subclasses__()
    return []


def _mistake(path: Path) -> str | None:
    """In words, what llm-compressor says in words of Python."""
    try:
        content = yaml.safe_load(_recipe_text(path)[0])
    except UnicodeDecodeError as error:
        return f"it is no UTF-8 text: {error}"
    except (yaml.YAMLError, RecursionError):
        return None
    if content is None:
        return "it is empty"
    if not isinstance(content, dict):
        return f"it holds no stages. {SHAPE}"
    for stage in content.values():
        for group in stage.values() if isinstance(stage, dict) else ():
            for name, fields in group.items() if isinstance(group, dict) else ():
                if fields is None:
                    return f"`{name}:` has no fields; write `{name}: {{}}`"
    return None


def keep_profiles(recipe: Recipe, directory: Path) -> None:
    """
    Set `profile_cache` in the recipe.

    :raises ValueError: if no modifier of the recipe has it
    """
    if not ours(recipe):
        raise ValueError(
            f"profile_cache={str(directory)!r} is for recipes with an "
            "AbsorptionAllocationModifier, and this one has none: leave it out"
        )
    for modifier in ours(recipe):
        modifier.profile_cache = expanded(directory)


def check_caches(recipe: Recipe, out: Path) -> None:
    """
    :raises ValueError: if a `profile_cache` lies in `out`, which is replaced as a
        whole, or cannot be written to
    """
    for cache in {modifier.profile_cache for modifier in ours(recipe)}:
        if cache is None:
            continue
        if _inside(out, cache) is not None:
            raise ValueError(
                f"profile_cache={cache!r} lies in {out}, where the model replaces "
                "whatever there is: name a directory beside it"
            )
        check_writable("profile_cache", cache)


def stage_reports(recipe: Recipe, out: Path, staging: Path) -> None:
    """
    Have reports whose `report_dir` lies in `out` written into `staging`, which is to
    take its place.
    """
    for modifier in ours(recipe):
        given = modifier.report_dir
        if given is not None and (inside := _inside(out, given)) is not None:
            modifier.stage_reports(str(staging / inside))


def ours(recipe: Recipe) -> list[absorb_plugin.AbsorptionAllocationModifier]:
    """The modifiers of this package, which leave the recipe in the end."""
    kind = absorb_plugin.AbsorptionAllocationModifier
    return [modifier for modifier in recipe.modifiers if isinstance(modifier, kind)]


def _inside(out: Path, directory: str) -> Path | None:
    """The way from `out` to the directory; None if that is elsewhere."""
    out, folder = out.expanduser().resolve(), Path(directory).resolve()
    return folder.relative_to(out) if folder.is_relative_to(out) else None


def prune(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe | Sequence[Modifier],
    samples: Dataset,
    *,
    pipeline: str = "independent",
    trust_remote_code: bool = False,
    seed: int = 0,
    output_dir: Path | None = None,
) -> PreTrainedModel:
    """
    Run `oneshot` on samples that are already tokenised, in their order.

    :param model: as `load_for_pruning` gives it
    :param tokenizer: the model's tokenizer, saved beside it
    :param recipe: parsed recipe, or modifiers
    :param samples: rows of `input_ids` and `attention_mask`, all equally long
    :param pipeline: "independent", "sequential" or "basic"
    :param trust_remote_code: llm-compressor reads the model's config again
    :param seed: of every random number generator
    :param output_dir: where to save model, tokenizer and recipe.yaml, or None
    :return: the pruned model
    :raises ValueError: if it could not be saved
    """
    # Else llm-compressor does the same and warns of it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_seed(seed)
    if output_dir is not None:
        check_packing(model)
        name_as_stored(model)  # whether or not the recipe has our modifier
    return oneshot(
        model=model,
        tokenizer=tokenizer,
        trust_remote_code_model=trust_remote_code,
        recipe=recipe if isinstance(recipe, Recipe) else list(recipe),
        dataset=samples,
        num_calibration_samples=len(samples),
        max_seq_length=len(samples[0]["input_ids"]),
        shuffle_calibration_samples=False,
        pipeline=pipeline,
        output_dir=None if output_dir is None else str(output_dir),
    )
