"""Whether the files hold what config.json makes."""

import torch
from transformers import PreTrainedModel

from absorb_plugin.evaluation.check_report import CheckReport
from absorb_plugin.evaluation.plan import stored_names
from absorb_plugin.evaluation.shards import Checkpoint

__all__ = ["check_shapes"]


def check_shapes(
    checkpoint: Checkpoint, skeleton: PreTrainedModel | None, report: CheckReport
) -> None:
    """
    Shapes of Linears, norms and embeddings, and norms and embeddings that are nowhere.

    :param skeleton: the model that config.json makes, without its weights
    :param report: takes what is found
    """
    if skeleton is None or report.other_method:  # which may store them as it likes
        return
    modules = {
        name: module
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        or "Norm" in type(module).__name__
    }
    wanted = {
        name: tuple(module.weight.shape)
        for name, module in modules.items()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    there = {
        name.removesuffix(".weight"): checkpoint.shape(name)
        for name in checkpoint.names
        if name.endswith(".weight")
    }
    other = [name for name in wanted.keys() & there if there[name] != wanted[name]]
    if other:
        name = min(other)
        report.problems.append(
            f"{len(other)} tensors have another shape than config.json says, "
            f"{name}.weight for one: {_times(there[name])}, and not "
            f"{_times(wanted[name])}. Copy the config.json of this very model, or the "
            "files"
        )
    # transformers may save them under other names
    absent = [
        name
        for name in wanted.keys() - stored_names(wanted, there)
        if not isinstance(modules[name], torch.nn.Linear)
    ]
    if absent:
        report.warnings.append(
            f"{len(absent)} norms or embeddings are in none of the files by their "
            f"names, {min(absent)} for one: where transformers knows them by no other "
            "name it makes them up at random, which loading it tells"
        )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
