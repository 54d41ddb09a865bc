"""What recipe.yaml says that every Linear of a saved model should have lost."""

import contextlib
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from compressed_tensors.utils import match_named_modules, match_targets
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from absorb_plugin.mistakes import check_patterns
from absorb_plugin.other_modifiers import DESTROYS_ZEROS

try:
    from transformers.initialization import no_init_weights
except ModuleNotFoundError:  # transformers 4
    from transformers.modeling_utils import no_init_weights

__all__ = ["loading_info", "make_skeleton", "model_class", "pruned_linears"]
__all__ += ["read_modifiers", "stored_names"]

# Names of an expert's Linears in Mixtral's checkpoints -> in llm-compressor's model.
OF_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# Class names of pruners, told without the second that llm-compressor takes to import.
COMMON = ("SparseGPTModifier", "WandaPruningModifier")
# They mask, and what was zero before is the first to be masked again.
ZEROS_STAY = ("WandaPruningModifier",)


class _Loader(yaml.SafeLoader):
    """llm-compressor writes some enums as Python objects: they are read as None."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def make_skeleton(directory: Path) -> PreTrainedModel:
    """
    The model with weights that take no memory: for its modules, their names and order.

    :raises Exception: whatever transformers raises for an architecture that it lacks
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    # Not the meta device: to make Linears of fused experts llm-compressor copies them.
    # Some models look at the numbers when they initialise weights, and there are none.
    with FakeTensorMode(), no_init_weights():
        model = model_class(config)._from_config(config)
        model.tie_weights()
        if _has_fused_experts(model):
            _linearize(model)
    return model


def _has_fused_experts(model: PreTrainedModel) -> bool:
    """Weights of three dimensions are theirs, or of convolutions (Mamba's)."""
    return any(
        weight is not None and weight.dim() == 3
        for module in model.modules()
        if not isinstance(module, torch.nn.Conv1d)
        for weight in module._parameters.values()
    )


def _linearize(model: PreTrainedModel) -> None:
    """Fused experts, as llm-compressor does before it prunes them."""
    with contextlib.redirect_stdout(io.StringIO()):  # there is no accelerator, it says
        import llmcompressor  # noqa: F401
    from absorb_plugin._llmcompressor import linearize_moe

    linearize_moe(model)


def model_class(config: PretrainedConfig) -> Any:
    """
    As which the model was saved; the language model of its kind, as
    `AutoModelForCausalLM` takes it, where config.json does not say.

    :raises Exception: if transformers has no such class
    """
    if config.architectures:
        return getattr(transformers, config.architectures[0])
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def loading_info(directory: Path, **options: Any) -> dict[str, Any]:
    """
    What transformers says of its loading of a model, which is let go.

    :param options: of `from_pretrained`
    :raises Exception: whatever it raises where it cannot load it
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    _, info = model_class(config).from_pretrained(
        directory, dtype="auto", output_loading_info=True, **options
    )
    return info


def read_modifiers(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """
    Class names and fields of the modifiers of a recipe, in their order.

    :raises ValueError: if it is no YAML, or not of a recipe's shape
    """
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if recipe is None:
            raise ValueError("it is empty")
        return [
            (name, dict(fields or {}))
            for stage in recipe.values()
            for key, group in stage.items()
            if key.endswith("modifiers")
            for name, fields in group.items()
        ]
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no recipe of llm-compressor: {error}") from error


def pruned_linears(
    modifiers: Iterable[tuple[str, Mapping[str, Any]]], model: PreTrainedModel
) -> dict[str, float]:
    """
    Full name of a Linear -> planned share of zeros, as llm-compressor reads a recipe.

    :param modifiers: from `read_modifiers`
    :param model: a skeleton will do
    :raises ValueError: naming a field that cannot be read, or if a list of sparsities
        has not one for each target
    """
    plan: dict[str, float] = {}
    there: dict[str, float] = {}  # what the modifiers before have left
    for name, fields in modifiers:
        if name in DESTROYS_ZEROS:
            there = {}
        if "sparsity" in fields and _prunes_linears(name, fields):
            found = _planned(name, fields, model)
            if _keeps_zeros(name, fields):
                found = {k: max(share, there.get(k, 0.0)) for k, share in found.items()}
            plan |= found
            there |= found
    return plan


def _keeps_zeros(name: str, fields: Mapping[str, Any]) -> bool:
    """Of a model that was pruned before; else a later modifier brings weights back."""
    return name in ZEROS_STAY or bool(fields.get("preserve_sparsity_mask"))


def _prunes_linears(name: str, fields: Mapping[str, Any]) -> bool:
    """Another modifier's sparsity may be of experts, or of anything."""
    if name in COMMON or "mask_structure" in fields:
        return True
    from absorb_plugin.pruners import PRUNERS

    return name in {pruner.modifier.__name__ for pruner in PRUNERS.values()}


def _planned(
    name: str, fields: Mapping[str, Any], model: PreTrainedModel
) -> dict[str, float]:
    targets = _patterns(name, "targets", fields.get("targets", ["Linear"]))
    ignore = _patterns(name, "ignore", fields.get("ignore"))
    layers = dict(match_named_modules(model, targets))
    values = _values(name, fields, len(layers))
    return {
        full.removesuffix("."): value
        for (outer, layer), value in zip(layers.items(), values, strict=True)
        for full, linear in _linears(outer, layer)
        if not match_targets(full, linear, ignore)
    }


def _patterns(name: str, field: str, value: object) -> list[str]:
    patterns = [value] if isinstance(value, str) else value or []
    if not (isinstance(patterns, list) and all(isinstance(x, str) for x in patterns)):
        raise ValueError(f"recipe.yaml, {name}: {field}={value!r} is no list of names")
    check_patterns(f"recipe.yaml, {name}: {field}", patterns)
    return patterns


def _values(name: str, fields: Mapping[str, Any], count: int) -> list[float]:
    """One sparsity for each target."""
    structure, sparsity = fields.get("mask_structure", "0:0"), fields["sparsity"]
    numbers = re.fullmatch(r"(\d+):(\d+)", str(structure))
    if numbers is None:
        raise ValueError(
            f"recipe.yaml, {name}: mask_structure={structure!r} is none as '0:0', '2:4'"
        )
    pruned, of = map(int, numbers.groups())
    if of:  # as in 2:4; the sparsity is ignored then
        return [pruned / of] * count
    if not isinstance(sparsity, list):
        return [_share(name, sparsity)] * count
    if len(sparsity) != count:
        raise ValueError(
            f"recipe.yaml gives {name} {len(sparsity)} sparsities, and its targets "
            f"match {count} modules of this model: the recipe is of another model"
        )
    return [_share(name, value) for value in sparsity]


def _share(name: str, value: Any) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError(
            f"recipe.yaml, {name}: sparsity={value!r} is no number between 0 and 1"
        )
    return share


def _linears(outer: str, layer: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """With the trailing dot of llm-compressor where the target is itself a Linear."""
    for inner, linear in match_named_modules(layer, ["Linear"]):
        yield f"{outer}.{inner}", linear


def stored_names(modules: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """
    Name of a Linear in the model -> in the files. transformers saves some
    architectures under other names than its modules have (the experts of Mixtral): what
    is not found as it is must agree in its numbers and last part. Of several that do
    (the same block of a language model and of its vision tower) the one that shares
    more parts of its name is taken.
    """
    modules, rest = list(modules), set(stored)
    found = {name: name for name in modules if name in rest}
    rest -= found.keys()
    by_place: dict[object, list[str]] = {}
    for name in rest:
        by_place.setdefault(_place(name), []).append(name)
    for name in modules:
        if name not in found and (match := _nearest(name, by_place.get(_place(name)))):
            found[name] = match
    return found


def _place(name: str) -> tuple[str, ...]:
    last = name.rpartition(".")[2]
    return (*re.findall(r"\.(\d+)(?=\.)", name), OF_EXPERTS.get(last, last))


def _nearest(name: str, candidates: Iterable[str] | None) -> str | None:
    """None if there is none, or several are equally near."""
    shared: dict[int, list[str]] = {}
    for candidate in candidates or ():
        parts = Counter(name.split(".")) & Counter(candidate.split("."))
        shared.setdefault(parts.total(), []).append(candidate)
    best = shared[max(shared)] if shared else []
    return best[0] if len(best) == 1 else None
