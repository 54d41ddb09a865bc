"""Find allocators, build them from recipe arguments, and call them with care."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
    entry_points,
)
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pluggy
import torch
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

import absorb_plugin.allocators as builtins
import absorb_plugin.hookspecs as hookspecs
from absorb_plugin.allocators.base import (
    Allocator,
    BaseAllocation,
    LinearGroup,
    Needs,
)
from absorb_plugin.distributed import OtherRankFailed
from absorb_plugin.mistakes import argument_problem, default_of
from absorb_plugin.names import Granularity

__all__ = [
    "PluginError",
    "RegisteredAllocator",
    "allocators",
    "notify_plugins",
    "build_allocator",
    "manager",
    "owner_of",
    "run_allocator",
    "run_measure",
    "version_of",
]

BUILTIN = "absorb_plugin"
NO_DISTRIBUTION = "no distribution (registered at run time)"


class PluginError(RuntimeError):
    """A plugin does not keep its side of the contract; the message says whose."""


@dataclass(frozen=True)
class RegisteredAllocator:
    """
    :param allocator: the class
    :param distribution: name and version of the package it comes from
    :param plugin: name of the entry point, "absorb_plugin" for the built-ins
    """

    allocator: type[Allocator]
    distribution: str
    plugin: str

    def __str__(self) -> str:
        return (
            f"allocator {self.allocator.name!r} of plugin {self.plugin!r} "
            f"({self.distribution})"
        )


def manager() -> pluggy.PluginManager:
    """
    The plugin manager, with built-ins and entry points loaded at the first call. A test
    may `register` a plugin of its own here, and `unregister` it afterwards.

    :raises PluginError: if a plugin cannot be imported or registered
    """
    return _load()[0]


def allocators() -> dict[str, RegisteredAllocator]:
    """
    Every allocator by name, the built-ins first.

    :raises PluginError: if a plugin cannot be imported, registers something that is no
        allocator, or a name that another plugin has taken
    """
    plugins, distributions = _load()
    found: dict[str, RegisteredAllocator] = {}
    # One at a time, not through `hook.register_allocators()`: its flat answer no longer
    # tells who registered what.
    for hook in plugins.hook.register_allocators.get_hookimpls():
        source = distributions.get(hook.plugin_name, NO_DISTRIBUTION)
        owner = f"plugin {hook.plugin_name!r} ({source})"
        try:
            classes: list[type[Allocator]] = [*hook.function()]  # type: ignore
        except Exception as error:
            raise PluginError(
                f"{owner} failed in register_allocators: {error!r}"
            ) from error
        for allocator in classes:
            _check_class(allocator, owner)
            entry = RegisteredAllocator(allocator, source, hook.plugin_name)
            if (other := found.get(allocator.name)) is not None:
                raise PluginError(
                    f"two allocators are called {allocator.name!r}: one of plugin "
                    f"{other.plugin!r} ({other.distribution}), one of {owner}. Rename "
                    "or uninstall one of them."
                )
            found[allocator.name] = entry
    return found


def listing() -> list[dict[str, Any]]:
    """
    What `absorb allocators --json` prints: one entry per allocator. A default that JSON
    cannot hold is there as text; that of an argument that is required is None. In place
    of what its plugin has wrong is a remark.

    :raises PluginError: as `allocators`
    """
    entries = []
    for name, entry in allocators().items():
        allocator, fields = entry.allocator, entry.allocator.model_fields
        entries.append(
            {
                "name": name,
                "distribution": entry.distribution,
                "arguments": {k: _plain(default_of(x)) for k, x in fields.items()},
                "required": [k for k, field in fields.items() if field.is_required()],
            }
            | _described(allocator)
        )
    return entries


def _described(allocator: type[Allocator]) -> dict[str, Any]:
    """Its class attributes, and a remark in place of one that is wrong."""
    keys = ("needs", "granularities", "cost", "paper")
    told = {key: getattr(allocator, key) for key in keys}
    told |= {key: f"({fault})" for key, fault in _faults(allocator).items()}
    if not isinstance(own := told["granularities"], str):  # of a set too in one order
        told["granularities"] = [x for x in get_args(Granularity) if x in own]
    return told


def _plain(value: Any) -> Any:
    """What JSON can hold, or the text of what it cannot."""
    try:
        plain = to_jsonable_python(value, fallback=str)
        json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return plain


def build_allocator(name: str, arguments: Mapping[str, Any]) -> Allocator:
    """
    :param name: as in `allocators()`
    :param arguments: values for the fields of that allocator
    :raises ValueError: for a name or an argument that does not exist, or a value out of
        range
    :raises PluginError: if what its class says of it is wrong, or anything else is
        raised
    """
    known = allocators()
    if name not in known:
        raise ValueError(
            f"allocator={name!r} is unknown. Available: {', '.join(sorted(known))}. "
            "Others appear when the package that registers them is installed."
        )
    allocator = known[name].allocator
    for fault in _faults(allocator).values():  # not before: others may be in use
        raise PluginError(f"{known[name]} has {fault}")
    try:
        return allocator(**arguments)
    except ValidationError as error:
        problems = "; ".join(argument_problem(allocator, x) for x in error.errors())
        raise ValueError(f"allocator {name!r}: {problems}") from error
    except Exception as error:  # of a validator, or the default of an argument
        raise PluginError(
            f"{known[name]} failed with the arguments {dict(arguments)}: {error!r}"
        ) from error


def notify_plugins(profile: Mapping[str, Any]) -> None:
    """
    Tell the plugins what was allocated.

    :raises PluginError: if one of them raises
    """
    try:
        manager().hook.allocation_finished(profile=profile)
    except Exception as error:
        hook = manager().hook.allocation_finished
        names = ", ".join(repr(one.plugin_name) for one in hook.get_hookimpls())
        raise PluginError(
            f"a plugin failed in allocation_finished: {error!r}. It is one of {names}: "
            "repair or uninstall it"
        ) from error


def run_allocator(
    allocator: Allocator, groups: Sequence[LinearGroup], sparsity: float
) -> BaseAllocation:
    """
    Call `allocator.allocate` and check what comes back.

    :param groups: G groups in model order, G >= 1
    :param sparsity: the global target S in [0, 1)
    :return: metric and base sparsity, float64 arrays of shape (G,)
    :raises PluginError: if it raises, or returns the wrong length, NaN, infinity, or a
        sparsity outside [0, 1]
    """
    if not groups:
        raise ValueError("there is nothing to allocate: no prunable Linear was found")
    owner = owner_of(allocator)
    try:
        result = allocator.allocate(groups, sparsity)
    except OtherRankFailed:
        raise
    except Exception as error:
        raise PluginError(f"{owner} failed in allocate: {error!r}") from error
    if not isinstance(result, BaseAllocation):
        raise PluginError(
            f"{owner} returned {type(result).__name__}, not a BaseAllocation"
        )
    metric = _vector(owner, groups, "metric", result.metric)
    base = _vector(owner, groups, "sparsity", result.sparsity)
    outside = [
        f"{group.name}: {value}"
        for group, value in zip(groups, base, strict=True)
        if not 0.0 <= value <= 1.0
    ]
    if outside:
        raise PluginError(
            f"{owner} returned a sparsity outside [0, 1] for {', '.join(outside[:3])}. "
            "Clip in the allocator; the budget step redistributes the rest."
        )
    _check_linear_metrics(owner, groups, result.linear_metrics)
    return BaseAllocation(metric, base, tuple(result.linear_metrics))


def run_measure(
    allocator: Allocator, linear: str, weight: torch.Tensor, gram: torch.Tensor
) -> float:
    """
    Call `allocator.measure` and check what comes back.

    :param linear: full name of the Linear
    :raises torch.OutOfMemoryError: as it is raised there, for the caller has a remedy
    :raises PluginError: if it raises anything else, or returns no finite number
    """
    try:
        number = allocator.measure(weight, gram)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise PluginError(
            f"{owner_of(allocator)} failed in measure, of {linear}: {error!r}"
        ) from error
    if not _is_finite(number):
        raise PluginError(
            f"{owner_of(allocator)} returned {number!r} from measure for {linear}; a "
            "finite number is needed"
        )
    return float(number)


@cache  # an exception is not cached, so a broken plugin fails at every call
def _load() -> tuple[pluggy.PluginManager, dict[str, str]]:
    """The manager, and the distribution of each plugin by its name."""
    plugins = pluggy.PluginManager(hookspecs.PROJECT)
    plugins.add_hookspecs(hookspecs)
    plugins.register(builtins, name=BUILTIN)
    distributions = {BUILTIN: _own_distribution()}
    for point in entry_points(group=hookspecs.PROJECT):
        source = _describe(point.dist)
        name = point.name
        if name in distributions:  # harmless as long as their allocators differ
            name = f"{point.name} of {source}"
        try:
            plugins.register(point.load(), name=name)
            plugins.check_pending()
        except Exception as error:
            raise PluginError(
                f"plugin {point.name!r} of {source} ({point.value}) could not be "
                f"loaded: {error!r}. Repair or uninstall it."
            ) from error
        distributions[name] = source
    return plugins, distributions


def _describe(dist: Distribution | None) -> str:
    return f"{dist.name} {dist.version}" if dist else "an unknown distribution"


def _own_distribution() -> str:
    try:
        return _describe(distribution("absorb-plugin"))
    except PackageNotFoundError:
        return "absorb-plugin (not installed)"


def _check_class(allocator: object, owner: str) -> None:
    if not (isinstance(allocator, type) and issubclass(allocator, Allocator)):
        raise PluginError(
            f"{owner} registered {allocator!r}, which is no subclass of Allocator"
        )
    if not isinstance(getattr(allocator, "name", None), str) or not allocator.name:
        raise PluginError(
            f"{owner} registered {allocator.__name__} without a `name: ClassVar[str]`"
        )


def _faults(allocator: type[Allocator]) -> dict[str, str]:
    """Class attribute -> what is wrong with it, as `cost=None: give a text`."""
    remedies: dict[str, str] = {}
    if allocator.needs not in get_args(Needs):
        remedies["needs"] = f"choose one of {list(get_args(Needs))}"
    known, own = get_args(Granularity), allocator.granularities
    kinds = tuple | list | set | frozenset
    if not (own and isinstance(own, kinds) and all(x in known for x in own)):
        remedies["granularities"] = f"give a tuple of some of {list(known)}"
    for key in ("paper", "cost"):
        if not isinstance(getattr(allocator, key), str):
            remedies[key] = "give a text"
    return {k: f"{k}={getattr(allocator, k)!r}: {x}" for k, x in remedies.items()}


def owner_of(allocator: Allocator) -> str:
    """Which allocator it is, of which plugin, and that plugin's version."""
    for entry in allocators().values():
        if entry.allocator is type(allocator):
            return str(entry)
    kind = type(allocator)
    return f"allocator {kind.name!r} ({kind.__module__}, not registered by any plugin)"


def version_of(allocator: Allocator) -> str:
    """
    What tells it from an allocator of the same name and arguments: its plugin, that
    plugin's version, and, for one that is being worked on, the files that it and the
    classes that it builds on are written in.
    """
    return f"{owner_of(allocator)}, {_source_digest(type(allocator))}"


@cache  # what is changed later is not what runs
def _source_digest(kind: type[Allocator]) -> str:
    hasher = hashlib.sha256()
    for one in kind.__mro__[: kind.__mro__.index(Allocator)]:
        file = getattr(sys.modules.get(one.__module__), "__file__", None)
        try:
            source = b"" if file is None else Path(file).read_bytes()
        except OSError:  # within an archive, say
            source = b""
        hasher.update(hashlib.sha256(source).digest())
    return hasher.hexdigest()


def _vector(
    owner: str, groups: Sequence[LinearGroup], what: str, values: object
) -> np.ndarray:
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise PluginError(
            f"{owner} returned a {what} that is no array of numbers ({error}): give "
            "one of numpy, or of Python's floats"
        ) from error
    if vector.shape != (len(groups),):
        raise PluginError(
            f"{owner} returned a {what} of shape {vector.shape} for {len(groups)} "
            "groups; one value per group is needed"
        )
    for group, value in zip(groups, vector, strict=True):
        if not np.isfinite(value):
            raise PluginError(f"{owner} returned {what}={value} for {group.name}")
    return vector


def _check_linear_metrics(
    owner: str,
    groups: Sequence[LinearGroup],
    linear_metrics: Sequence[Mapping[str, float]],
) -> None:
    if not isinstance(linear_metrics, list | tuple) or not all(
        isinstance(metrics, Mapping) for metrics in linear_metrics
    ):
        raise PluginError(
            f"{owner} returned linear_metrics={linear_metrics!r}: give a list with a "
            "mapping per group, or leave it out"
        )
    if not linear_metrics:
        return
    if len(linear_metrics) != len(groups):
        raise PluginError(
            f"{owner} returned linear_metrics of length {len(linear_metrics)} for "
            f"{len(groups)} groups"
        )
    for group, metrics in zip(groups, linear_metrics, strict=True):
        for name, value in metrics.items():
            if name not in group.linears or not _is_finite(value):
                raise PluginError(
                    f"{owner} returned the linear metric {name}={value} for "
                    f"{group.name}, which holds {', '.join(group.linears)}"
                )


def _is_finite(value: object) -> bool:
    """Whether it is a number, of Python, numpy or torch, and a finite one."""
    try:
        return value is not None and bool(np.isfinite(float(value)))  # type: ignore
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
