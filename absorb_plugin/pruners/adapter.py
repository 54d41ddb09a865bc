"""
The pruning modifiers that follow in the recipe: find them, set their sparsities.

Relies on names of llm-compressor which are not part of its recipes: `_target_layers`,
`PRUNABLE_LAYER_TYPES`, the session's recipe.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import takewhile

import torch
from compressed_tensors.utils import match_named_modules, match_targets
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import (
    PRUNABLE_LAYER_TYPES,
    SparsityModifierBase,
)
from loguru import logger
from torch.nn import Linear

from absorb_plugin.blocks import MUCH, BlockMap, linear_parameters
from absorb_plugin.language_model import language_model
from absorb_plugin.mistakes import check_patterns
from absorb_plugin.other_modifiers import (
    DESTROYS_ZEROS,
    REMOVES_LINEARS,
    ROTATE,
    quantizes,
)
from absorb_plugin.pruners import Pruner, pruner_class
from absorb_plugin.pruners.quantization import (
    QuantizedLinears,
    is_quantized,
    unjudged,
)
from absorb_plugin.pruners.recipe import modifiers_before
from absorb_plugin.search.budget import check_budget

__all__ = [
    "PrunerAdapter",
    "check_aim",
    "find_pruners",
    "quantized_afterwards",
    "without_ignored",
]


# major, minor
NEWEST_TESTED = (0, 14)


@dataclass(frozen=True)
class PrunerAdapter:
    """
    A pruning modifier with a budget.

    :param modifier: a SparseGPTModifier, WandaPruningModifier, or subclass
    :param sparsity: the budget S: the scalar that the user wrote
    :param layers: full name -> module that its `targets` match, in the module order
        that upstream's list of sparsities follows
    :param blocks: the decoder blocks; of their Linears only those it will prune
    :param named: modules outside the blocks that the user targets by name
    :param pruner: its arithmetic
    """

    modifier: SparsityModifierBase
    sparsity: float
    layers: Mapping[str, torch.nn.Module]
    blocks: BlockMap
    named: frozenset[str]
    pruner: Pruner

    @property
    def name(self) -> str:
        return type(self.modifier).__name__

    def set_sparsities(self, sparsities: Mapping[str, float]) -> None:
        """
        Replace the scalar `sparsity` by a list in the module order of the targets.
        Where a target holds Linears of unequal sparsity, or some are to stay dense, the
        targets become the full names of the Linears that are pruned. Both fields are
        saved in recipe.yaml, so the run can be replayed without us.

        :param sparsities: full name of a Linear -> target, for all of `blocks`
        """
        modifier = self.modifier
        if min(sparsities.values()) == 0 < max(sparsities.values()):
            return self._set_by_name(sparsities)
        values: list[float] = []
        for name, layer in self.layers.items():
            inside = {
                sparsities[linear]
                for linear in _prunable(name, layer)
                if linear in sparsities
            }
            if len(inside) > 1:
                return self._set_by_name(sparsities)
            outside = self.sparsity if name in self.named else 0.0
            values.append(float(inside.pop() if inside else outside))
        if list(modifier._target_layers) != list(self.layers):
            raise RuntimeError(
                f"{self.name} matched other targets when it was initialised than "
                "absorb_plugin did: the model was changed in between"
            )
        modifier.sparsity = values

    def _set_by_name(self, sparsities: Mapping[str, float]) -> None:
        modifier = self.modifier
        # with a target of 0.0 SparseGPT still zeroes a weight per column block
        model_order = {
            name: layer
            for name, layer in _linears_of(self.layers).items()
            if sparsities.get(name) or name in self.named
        }
        modifier.targets = list(model_order)
        modifier._target_layers = model_order
        modifier.sparsity = [
            float(sparsities.get(name, self.sparsity)) for name in model_order
        ]


def find_pruners(
    modifier: Modifier,
    model: torch.nn.Module,
    blocks: BlockMap,
    ignore: Sequence[str],
    max_sparsity: float,
) -> list[PrunerAdapter]:
    """
    The pruning modifiers after `modifier` in the active recipe, checked. Call it in
    `on_initialize`: later the pipelines show one modifier at a time.

    :param modifier: ours; those after a second one of its class belong to that
    :param ignore: names or patterns to leave dense beside their own `ignore`
    :raises ValueError: if there is none, or one cannot take a list of sparsities, or
        another takes Linears away
    """
    _warn_of_version(version("llmcompressor"))
    recipe = active_session().lifecycle.recipe.modifiers
    after = recipe[len(modifiers_before(modifier)) + 1 :]
    ours = takewhile(lambda other: not isinstance(other, type(modifier)), after)
    found = [other for other in ours if isinstance(other, SparsityModifierBase)]
    if not found:
        raise ValueError(
            f"no pruning modifier follows {type(modifier).__name__} in the recipe: put "
            "a SparseGPTModifier or WandaPruningModifier after it"
        )
    _check_nothing_leaves(recipe, modifier)
    first = after.index(found[0])
    _warn_of_lost_zeros(after[first + 1 :], found[0])
    _warn_of_rotations(after[:first], modifier)
    _warn_of_quantized(recipe, blocks)
    _check_ignored(ignore, model)
    return [_resolve(other, model, blocks, ignore, max_sparsity) for other in found]


def check_aim(pruners: Sequence[PrunerAdapter]) -> tuple[str, ...]:
    """
    Call it in `on_initialize`.

    :return: class names of the modifiers that quantise what has been pruned, and of
        those that prepare it for that; none if nothing is quantised
    :raises ValueError: if a bound on the loss cannot be kept by what is judged
    """
    recipe = active_session().lifecycle.recipe.modifiers
    names = [type(x).__name__ for x in recipe if isinstance(x, SparsityModifierBase)]
    if len(names) > 1:
        raise ValueError(
            f"max_loss_increase bounds what one pruning modifier costs, and the recipe "
            f"has {' and '.join(names)}: what they cost together is judged by nobody. "
            "Use one for all targets, or give each a sparsity instead"
        )
    for found in pruners:
        if found.named:
            raise ValueError(
                f"max_loss_increase: {found.name} targets {sorted(found.named)[0]} by "
                "name, which lies outside the blocks and would be pruned to the upper "
                f"bound, {found.sparsity}, without being judged. Name it in `ignore`"
            )
    (last,) = (n for n, x in enumerate(recipe) if x is pruners[0].modifier)
    for modifier in filter(quantizes, recipe[:last]):
        logger.warning(
            "max_loss_increase bounds what pruning costs, and "
            f"{type(modifier).__name__}, which stands before the pruning modifier, "
            "costs more beside it, which nobody judges here: put it after, or ask "
            "`absorb eval` what both cost"
        )
    after = recipe[last + 1 :]
    if not any(map(quantizes, after)):
        return ()
    return tuple(dict.fromkeys(type(modifier).__name__ for modifier in after))


def quantized_afterwards(
    modifiers: Sequence[str], model: torch.nn.Module, blocks: BlockMap
) -> QuantizedLinears | None:
    """
    Call it when all modifiers are initialised.

    :param modifiers: as `check_aim` found them
    :return: what the bound on the loss is judged with, if anything
    """
    if not modifiers:
        return None
    if others := unjudged(model, blocks):
        first, *rest = others
        logger.warning(
            "max_loss_increase is judged with the blocks' Linears quantised, and "
            f"{' and '.join(modifiers)} quantises {first}"
            f"{f' and {len(rest)} more' if rest else ''}, which nobody judges here: "
            "`absorb eval` tells what all of it costs"
        )
    found = QuantizedLinears.of(modifiers, blocks)
    if found.better:
        logger.info(
            "max_loss_increase is judged with weights rounded to nearest; "
            f"{found.better} chooses them with more care, and costs less as a rule"
        )
    return found


@cache
def _warn_of_version(installed: str) -> None:
    """Once: a newer llm-compressor may work as well, and nobody has tried."""
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) > NEWEST_TESTED:
        logger.warning(
            f"absorb_plugin was tested up to llm-compressor {NEWEST_TESTED[0]}."
            f"{NEWEST_TESTED[1]}, this is {installed}: going on. If a pruning modifier "
            "fails or prunes otherwise than profile.json says, install an older one"
        )


def _check_nothing_leaves(recipe: Sequence[Modifier], ours: Modifier) -> None:
    """Within one run the budget would be of Linears that are there no more."""
    for modifier in recipe:
        if (name := type(modifier).__name__) in REMOVES_LINEARS:
            raise ValueError(
                f"{name} takes Linears out of the model while the recipe runs, and "
                f"{type(ours).__name__} would share the budget out over them too. Give "
                f"{name} a `oneshot` of its own, before this one"
            )


def _warn_of_lost_zeros(after: Sequence[Modifier], pruner: Modifier) -> None:
    for modifier in after:
        names = {base.__name__ for base in type(modifier).__mro__}
        for name in names & DESTROYS_ZEROS.keys():
            logger.warning(
                f"{name} stands after {type(pruner).__name__} in the recipe and "
                f"{DESTROYS_ZEROS[name]}: the model will be less sparse than asked "
                "for. QuantizationModifier keeps every zero"
            )


def _warn_of_rotations(before: Sequence[Modifier], ours: Modifier) -> None:
    for modifier in before:
        if type(modifier).__name__ in ROTATE:
            logger.warning(
                f"{type(modifier).__name__} stands after {type(ours).__name__} in the "
                "recipe and rotates the weights, so the allocation is of other weights "
                "than those that are pruned. Put it before"
            )


def _warn_of_quantized(recipe: Sequence[Modifier], blocks: BlockMap) -> None:
    """Those of the recipe may have begun already."""
    count = sum(map(is_quantized, blocks.linears().values()))
    if count and not any(map(quantizes, recipe)):
        logger.warning(
            f"{count} Linears of the model are quantised already. They are pruned as "
            "they dequantise, and saved in the same format with the scales that they "
            "had, which nothing here judges: `absorb eval` tells what the whole costs"
        )


def without_ignored(
    model: torch.nn.Module, blocks: BlockMap, ignore: Sequence[str]
) -> BlockMap:
    """
    :param ignore: names or patterns of Linears to leave dense
    :raises ValueError: of a wrong expression, or if none is left
    """
    _check_ignored(ignore, model)
    kept = [
        name
        for name, linear in blocks.linears().items()
        if not _ignored(name, linear, ignore)
    ]
    if not kept:
        raise ValueError(f"ignore={[*ignore]} leaves no Linear of the decoder blocks")
    return blocks.restrict(kept)


def _check_ignored(ignore: Sequence[str], model: torch.nn.Module) -> None:
    """
    A warning of what leaves nothing dense; of a pruner's own `ignore` that is for
    llm-compressor to say.

    :raises ValueError: of a wrong expression
    """
    check_patterns("ignore", _as_list(ignore))
    linears = [(n, x) for n, x in model.named_modules() if isinstance(x, Linear)]
    for pattern in _as_list(ignore):
        if not any(_ignored(name, module, [pattern]) for name, module in linears):
            logger.warning(
                f"ignore: {pattern!r} matches no Linear, so nothing is left dense for "
                "it. Write a full name, or re: and an expression that matches from the "
                "beginning, as re:.*down_proj"
            )


def _resolve(
    modifier: SparsityModifierBase,
    model: torch.nn.Module,
    blocks: BlockMap,
    ignore: Sequence[str],
    max_sparsity: float,
) -> PrunerAdapter:
    name = type(modifier).__name__
    kind = pruner_class(modifier)
    kind.check(modifier)
    sparsity, pruner = _scalar_sparsity(modifier), kind.of(modifier)
    try:
        check_budget(sparsity, max_sparsity)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if isinstance(modifier.targets, str):
        logger.warning(
            f"{name}.targets is the bare string {modifier.targets!r}, which "
            "llm-compressor matches letter by letter, that is, with nothing; taking "
            f"it as {[modifier.targets]!r}"
        )
        modifier.targets = [modifier.targets]
    check_patterns(f"{name}.targets", modifier.targets)
    check_patterns(f"{name}.ignore", _as_list(modifier.ignore))
    modifier.ignore = [*_as_list(modifier.ignore), *_as_list(ignore)]

    layers = dict(match_named_modules(model, modifier.targets))
    in_blocks = blocks.linears()
    homes = [block.name for block in blocks.blocks]
    by_name = [t for t in modifier.targets if t.startswith("re:") or t in layers]
    pruned, named, spared = [], set(), []
    outside: dict[str, torch.nn.Module] = {}
    for linear, module in _linears_of(layers).items():
        ignored = linear in blocks.routers or _ignored(linear, module, modifier.ignore)
        if linear in in_blocks and not ignored:
            pruned.append(linear)
        elif linear not in in_blocks and not ignored and _names(linear, by_name):
            named.add(linear)
        elif not _ignored_by_upstream(linear, module, modifier.ignore):
            spared.append(linear)
            if not ignored and not any(linear.startswith(f"{b}.") for b in homes):
                outside[linear] = module
    mine = blocks.restrict(pruned)
    if not mine.prunable:
        raise ValueError(
            f"{name} would prune no Linear inside the decoder blocks: targets="
            f"{modifier.targets}, ignore={modifier.ignore}. Target the block class "
            f"({type(blocks.blocks[0].module).__name__}) or 'Linear'"
        )
    _check_targets_within_blocks(name, layers, set(pruned), blocks)
    _check_outside(name, model, mine, outside)
    # Upstream asks for "lm_head." with a trailing dot when a Linear is itself the
    # target, so patterns that end in "$" and plain names miss it. And a target of 0.0
    # is not enough: SparseGPT zeroes a weight per column block even then.
    modifier.ignore = [
        *modifier.ignore,
        *(f"re:{re.escape(linear)}\\.?$" for linear in spared),
    ]
    return PrunerAdapter(modifier, sparsity, layers, mine, frozenset(named), pruner)


def _scalar_sparsity(modifier: SparsityModifierBase) -> float:
    name = type(modifier).__name__
    remedy = "Absorption needs one scalar `sparsity`, the budget that it distributes"
    if modifier.sparsity_profile is not None:
        raise ValueError(
            f"{name} has sparsity_profile={modifier.sparsity_profile!r}. {remedy}; "
            "name the profile as `allocator` of AbsorptionAllocationModifier instead"
        )
    if isinstance(modifier.sparsity, bool) or not isinstance(
        modifier.sparsity, int | float
    ):
        raise ValueError(f"{name} has sparsity={modifier.sparsity!r}. {remedy}")
    if modifier.mask_structure != "0:0":
        raise ValueError(
            f"{name} has mask_structure={modifier.mask_structure!r}, which fixes the "
            "sparsity of every row, so llm-compressor would ignore our targets. Use "
            'mask_structure: "0:0", or remove AbsorptionAllocationModifier'
        )
    return float(modifier.sparsity)


def _prunable(name: str, layer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Full name -> module that upstream prunes when `layer` is a target."""
    return {
        f"{name}.{inner}".removesuffix("."): module
        for inner, module in match_named_modules(layer, PRUNABLE_LAYER_TYPES)
    }


def _linears_of(layers: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    return {
        linear: module
        for name, layer in layers.items()
        for linear, module in _prunable(name, layer).items()
    }


def _ignored(name: str, module: torch.nn.Module, ignore: Iterable[str]) -> bool:
    """As the user meant it (plain name) or as upstream reads it (trailing dot)."""
    return bool(
        match_targets(name, module, ignore) or match_targets(f"{name}.", module, ignore)
    )


def _ignored_by_upstream(
    name: str, module: torch.nn.Module, ignore: Iterable[str]
) -> bool:
    """Whichever of the two names upstream asks for, depending on the target."""
    return bool(
        match_targets(name, module, ignore)
        and match_targets(f"{name}.", module, ignore)
    )


def _names(linear: str, targets: Iterable[str]) -> bool:
    return any(
        target == linear
        or (target.startswith("re:") and re.match(target[3:], linear) is not None)
        for target in targets
    )


def _check_targets_within_blocks(
    name: str,
    layers: Mapping[str, torch.nn.Module],
    pruned: set[str],
    blocks: BlockMap,
) -> None:
    """Upstream takes one sparsity per target, so no target may span two blocks."""
    home = {
        block.full_name(linear): block.name
        for block in blocks.blocks
        for linear in block.linears
    }
    for target, layer in layers.items():
        homes = {
            home[linear] for linear in _prunable(target, layer) if linear in pruned
        }
        if len(homes) > 1:
            raise ValueError(
                f"{name} targets {target!r}, which spans {len(homes)} decoder blocks "
                "and can have one sparsity only. Target the block class "
                f"({type(blocks.blocks[0].module).__name__}) or 'Linear'"
            )


def _check_outside(
    name: str,
    model: torch.nn.Module,
    blocks: BlockMap,
    outside: Mapping[str, torch.nn.Module],
) -> None:
    """
    What the user targets and no block holds stays dense, and the budget is not one of
    it: a warning where that is much.

    :param outside: full name -> Linear, targeted and not ignored
    :raises ValueError: if other blocks of the same class are among it
    """
    head = language_model(model).get_output_embeddings()
    left = {linear: module for linear, module in outside.items() if module is not head}
    kinds = {type(block.module) for block in blocks.blocks}
    inside = set(blocks.modules)
    for home, module in model.named_modules():
        twin = type(module) in kinds and module not in inside
        if twin and any(linear.startswith(f"{home}.") for linear in left):
            raise ValueError(
                f"{name} targets Linears of {home}, a {type(module).__name__} that is "
                f"not in the chain of blocks ({blocks.blocks[0].name} …) and would "
                "stay dense: absorption is defined for a single chain. Name it in "
                "`ignore`, or prune without AbsorptionAllocationModifier"
            )
    dense, pruned = (
        sum(linear_parameters(x) for x in found.values() if isinstance(x, Linear))
        for found in (left, blocks.linears())
    )
    if dense > MUCH * (dense + pruned):
        logger.warning(
            f"{name} targets {len(left)} Linears outside the decoder blocks "
            f"({next(iter(left))} …), {dense / (dense + pruned):.0%} of the weights it "
            "targets: they stay dense, and its sparsity is that of the blocks. Name "
            "them in `ignore` to say that this is meant"
        )


def _as_list(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
