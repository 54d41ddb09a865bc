"""A thin wrapper over llm-compressor's `oneshot`, for the command line and the demo."""

import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from loguru import logger
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, set_seed

import absorb_plugin  # registers the modifier that a recipe may name
from absorb_plugin.files import check_writable

__all__ = [
    "check_length",
    "check_output",
    "check_space",
    "keep_profiles",
    "kept_files",
    "load_config",
    "load_recipe",
    "prune",
    "staged_directory",
]


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
            "--profile-cache is for recipes with an AbsorptionAllocationModifier, and "
            "this one has none: leave it out"
        )
    check_writable("--profile-cache", str(directory))
    for modifier in ours:
        modifier.profile_cache = str(directory)


def load_config(model: str) -> PretrainedConfig:
    """
    :param model: directory or hub id, of which only the config is read
    :return: config of the language model
    :raises FileNotFoundError: if `model` looks like a directory and there is none
    """
    if not Path(model).exists() and (
        model.startswith((".", "/", "~")) or model.count("/") > 1
    ):
        raise FileNotFoundError(f"{model}: no such model directory")
    return AutoConfig.from_pretrained(model).get_text_config()


def check_length(config: PretrainedConfig, length: int) -> None:
    """
    :raises ValueError: if windows of `length` tokens do not fit the model
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"--seq-len {length} is longer than the model's {positions} positions"
        )


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


def check_output(out: Path, overwrite: bool) -> None:
    """
    :raises FileExistsError: if `out` is a file, holds files and `overwrite` is not set,
        or holds something that is not a model
    """
    out = out.expanduser().absolute()
    for left in sorted(out.parent.glob(f".{glob.escape(out.name)}.*.*")):
        if left.suffix in (".partial", ".old"):
            # not ours to delete: another run may be writing there
            logger.warning(
                f"{left} was left by a run that was killed, or is one that still runs: "
                + (
                    "an unfinished model, delete it"
                    if left.suffix == ".partial"
                    else f"the model that was in {out} before"
                )
            )
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file, not a directory")
    # a run that was killed may have left a directory for its report
    if all(path.is_dir() for path in out.rglob("*")):
        return
    if not overwrite:
        raise FileExistsError(f"{out} is not empty: choose another, or --overwrite")
    if not (out / "config.json").is_file():
        raise FileExistsError(
            f"{out} has files in it but no config.json, so it is no saved model: it "
            "will not be overwritten"
        )


def check_space(out: Path, model: str) -> None:
    """
    :param model: directory or hub id; where it is a directory, its weights tell how
        much the pruned ones will take
    :raises OSError: if they will not fit where `out` is to be
    """
    needed = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    folder = out.expanduser().absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 1e9:.2f} GB free, and the pruned model needs "
            f"{needed / 1e9:.2f}: make room, or choose another directory",
        )


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """
    A directory beside `out` that takes its place when the block ends well, and is
    removed when it does not: `out` is never half-written. What was in `out` is gone
    afterwards.

    :raises OSError: naming the remedy where the disk is full
    """
    out = out.expanduser().absolute()
    run = uuid.uuid4().hex[:8]
    staging = out.with_name(f".{out.name}.{run}.partial")
    old = out.with_name(f".{out.name}.{run}.old")
    try:
        staging.mkdir(parents=True)
        yield staging
        if out.exists():
            # The new one is complete by now, so a crash in here still loses nothing.
            out.rename(old)
        staging.rename(out)
    except Exception as error:
        if "No space left" not in str(error):  # the words of errno and of safetensors
            raise
        raise OSError(
            errno.ENOSPC,
            f"{out} was not written, the disk is full ({error}): make room, or choose "
            "another directory",
        ) from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for leftover in (staging, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def kept_files(out: Path, staging: Path) -> Iterator[None]:
    """
    Files that the run itself writes into `out`, as a report whose directory the recipe
    puts there, come along when `staging` takes the place of `out`.
    """
    out = out.expanduser().absolute()
    existed, before = out.exists(), _times(out)
    try:
        yield
        for path, time in _times(out).items():
            if before.get(path) != time:
                target = staging / path.relative_to(out)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
    finally:
        if not existed:
            shutil.rmtree(out, ignore_errors=True)


def _times(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }
