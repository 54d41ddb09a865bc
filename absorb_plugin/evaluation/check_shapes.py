"""Whether the files hold what config.json makes."""

import contextlib
import io
import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from absorb_plugin.evaluation.check_report import CheckReport
from absorb_plugin.evaluation.plan import loading_info, stored_names
from absorb_plugin.evaluation.shards import Checkpoint
from absorb_plugin.mistakes import in_one_line

__all__ = ["check_absent", "check_shapes", "weights_not_found"]


def check_shapes(
    checkpoint: Checkpoint, skeleton: PreTrainedModel | None, report: CheckReport
) -> None:
    """
    Shapes of Linears, norms and embeddings.

    :param skeleton: the model that config.json makes, without its weights
    :param report: takes what is found
    """
    if skeleton is None or report.other_method:  # which may store them as it likes
        return
    wanted, there = _wanted(skeleton), _stored(checkpoint)
    other = [name for name in wanted.keys() & there if there[name] != wanted[name]]
    if other:
        name = min(other)
        report.problems.append(
            f"{len(other)} tensors have another shape than config.json says, "
            f"{name}.weight for one: {_times(there[name])}, and not "
            f"{_times(wanted[name])}. Copy the config.json of this very model, or the "
            "files"
        )


def check_absent(
    checkpoint: Checkpoint, skeleton: PreTrainedModel | None, report: CheckReport
) -> None:
    """
    Weights that are in none of the files, as far as nothing was said of them yet.

    :param skeleton: as of `check_shapes`
    """
    if report.other_method:
        return
    try:
        absent = weights_not_found(checkpoint.directory)
    except Exception as error:  # anything, of an architecture that it lacks
        report.doubtful = True
        report.warnings.append(
            "transformers does not say which weights it would find "
            f"({in_one_line(error)[:200]}): whether it loads them is told by "
            "a load"
        )
        if skeleton is not None:
            _warn_by_names(checkpoint, skeleton, report)
        return
    absent = [name for name in absent if name not in report.told]
    if absent:
        report.problems.append(
            f"{len(absent)} weights are in none of the files by a name that "
            f"transformers reads, {absent[0]} for one: it puts random numbers in their "
            "place. Save the model anew, or copy the config.json of this very model"
        )


def _warn_by_names(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, report: CheckReport
) -> None:
    """Where transformers cannot say what it would find, norms and embeddings."""
    wanted = _wanted(skeleton)
    # it may save them under other names
    found = stored_names(wanted, _stored(checkpoint))
    absent = [
        name
        for name in wanted.keys() - found
        if not isinstance(skeleton.get_submodule(name), torch.nn.Linear)
    ]
    if absent:
        report.warnings.append(
            f"{len(absent)} norms or embeddings are in none of the files by their "
            f"names, {min(absent)} for one: where transformers knows them by no other "
            "name it makes them up at random, which loading it tells"
        )


def _wanted(skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name of a Linear, norm or embedding -> shape of its weight."""
    return {
        name: tuple(module.weight.shape)
        for name, module in skeleton.named_modules()
        if (
            isinstance(module, torch.nn.Linear | torch.nn.Embedding)
            or "Norm" in type(module).__name__
        )
        and isinstance(getattr(module, "weight", None), torch.Tensor)
    }


def _stored(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): checkpoint.shape(name)
        for name in checkpoint.names
        if name.endswith(".weight")
    }


def weights_not_found(directory: Path) -> list[str]:
    """
    Names of what transformers would find no weights for, by its own rules. Weights take
    no memory.

    :raises Exception: whatever transformers raises where it could not load the model
    """
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)  # it logs a table of them
        with contextlib.redirect_stderr(io.StringIO()):  # and shows bars
            info = loading_info(directory, device_map="meta")
    finally:
        logger.setLevel(level)
    return sorted(info["missing_keys"])


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
