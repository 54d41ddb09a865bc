"""
Measurements kept on disk, so that a run that was interrupted, or one at another
sparsity, does not take them again.

An entry is one safetensors file: tensors, and beside them JSON with the key, the rest
of what was measured, and a checksum over all of it. Its name tells the key:

    STATION-MODEL-SAMPLES-MEASUREMENT.safetensors

three shortened digests of the model with the software, of the calibration samples, and
of all that a probe was made with. Nothing is unpickled.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedModel

from absorb_plugin import distributed
from absorb_plugin.allocators.base import Remember
from absorb_plugin.files import replace_file
from absorb_plugin.fingerprint import digest, model_digest

if TYPE_CHECKING:
    from absorb_plugin.forward.probe import Probe

__all__ = ["ProfileCache", "RefusedEntry", "pack", "unpack"]

FORMAT = "1"
SHOWN = 12  # digits of a digest in a file name
SLUG = 80  # letters of what was measured; the digests tell entries apart


class RefusedEntry(Exception):
    """A file in the cache that must not be used; the message says why."""


class ProfileCache:
    """
    :param directory: where entries are; made if missing. Several processes may use it
    :param model: the dense model; the first rank hashes it, here
    """

    def __init__(self, directory: str, model: PreTrainedModel) -> None:
        self._folder = Path(directory)
        with distributed.fail_together():
            mine = model_digest(model) if distributed.is_first() else ""
        self._model = distributed.from_first(mine)
        self._kept = self._list()
        self._made_with: WeakKeyDictionary[Probe, str] = WeakKeyDictionary()

    def load_or_run(
        self,
        what: str,
        samples: Sequence[Mapping[str, torch.Tensor]],
        probe: "Probe",
        memory: int,
        run: Callable[[], None],
    ) -> None:
        """
        Give the probe what it measured in an earlier run, or measure and keep it.

        :param what: the station, for messages and the file's name
        :param samples: all that what is measured depends on
        :param probe: what its attributes are before its first run is part of the
            key, and what it has measured so far
        :param memory: how far batches are split, which rounding depends on
        :param run: measures
        """
        if not probe.state:
            raise TypeError(f"{type(probe).__name__}.state names nothing to keep")
        if probe not in self._made_with:  # later, a run may have left things
            made_with = {k: v for k, v in vars(probe).items() if k not in probe.state}
            self._made_with[probe] = digest([type(probe).__name__, made_with])
        so_far = [vars(probe)[name] for name in probe.state]
        # what a probe has measured is that of its rank's samples
        share = (distributed.rank(), distributed.ranks())
        measurement = [self._made_with[probe], so_far, memory, share]
        key = {
            "model": self._model,
            "samples": digest(samples),
            "measurement": digest(measurement),
        }
        before = {name: vars(probe)[name] for name in probe.state}
        found = self._find(what, key, before)
        # in step with ranks that have to measure
        there = found is not None
        if probe.in_step:
            there = all(distributed.meet(there))
        if found is not None and there:
            vars(probe).update(found)
            return
        run()
        self._keep(what, key, {name: vars(probe)[name] for name in probe.state})

    def numbers_for(self, owner: str) -> Callable[[str], Remember]:
        """
        `LinearStatistics.remember` of an allocator, for each Linear's full name.

        :param owner: which allocator, of which version
        """
        return lambda linear: partial(self._number, owner, linear)

    def _number(
        self, owner: str, linear: str, name: str, compute: Callable[[], float]
    ) -> float:
        key = {
            "model": self._model,
            "samples": digest([]),
            "measurement": digest([owner, linear, name]),
        }
        what = f"{name} of {linear}"
        found = self._find(what, key, {"number": 0.0})
        if found is not None:
            return found["number"]
        number = float(compute())
        if math.isfinite(number):  # else it is refused, and may be right another time
            self._keep(what, key, {"number": number})
        return number

    def _find(
        self, what: str, key: Mapping[str, str], like: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """:param like: the names that are asked for, with values of their types"""
        path = self._path(what, key)
        if not os.path.lexists(path):
            self._explain_missing(what, path)
            return None
        try:
            if not path.is_file():  # of a pipe nobody would ever read the end
                raise RefusedEntry("it is no file")
            found = _read(path, key)
            _check_names(found, like)
        except RefusedEntry as refused:
            logger.warning(
                f"profile_cache: {path} is not used, {refused}. Measuring again"
            )
            return None
        logger.info(f"{what}: taken from {path}")
        return found

    def _list(self) -> dict[str, list[list[str]]]:
        """What was kept by earlier runs: station -> the rest of the files' names."""
        found: dict[str, list[list[str]]] = {}
        for path in self._folder.glob("*-*-*-*.safetensors"):
            station, *key = path.stem.split("-")
            found.setdefault(station, []).append(key)
        return found

    def _explain_missing(self, what: str, path: Path) -> None:
        """Where measurements were kept and none fits, a user wonders why."""
        station, *wanted = path.stem.split("-")
        kept = self._kept.get(station, [])
        reasons = {
            1: "another model (weights, configuration, device, or versions of the "
            "software)",
            2: "other calibration samples",
        }
        for shared, reason in reasons.items():
            if kept and not any(k[:shared] == wanted[:shared] for k in kept):
                logger.info(f"{what}: what profile_cache holds is of {reason}")
                return

    def _keep(
        self, what: str, key: Mapping[str, str], values: Mapping[str, Any]
    ) -> None:
        """A run does not fail for want of a place to keep what it measured."""
        path = self._path(what, key)
        try:
            replace_file(path, _encode(key, values))
        except (OSError, RuntimeError) as error:  # the latter of links in a circle
            reason = getattr(error, "strerror", None) or error
            logger.warning(
                f"profile_cache: {path} could not be written ({reason}), so "
                f"the next run measures {what!r} again. Make room, or name another "
                "directory"
            )

    def _path(self, what: str, key: Mapping[str, str]) -> Path:
        plain = (c if c.isascii() and c.isalnum() else "_" for c in what.lower())
        slug = "".join(plain)[:SLUG]
        shown = "-".join(part[:SHOWN] for part in key.values())
        return self._folder / f"{slug}-{shown}.safetensors"


def pack(value: object, tensors: dict[str, torch.Tensor]) -> Any:
    """
    A value as JSON; its tensors and arrays go to `tensors`.

    :raises TypeError: for a type that `unpack` would not give back as it was
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": float(value).hex()}
    if isinstance(value, torch.Tensor | np.ndarray):
        name = str(len(tensors))
        if isinstance(value, np.ndarray):
            tensors[name] = torch.from_numpy(np.array(value))
            return {"tensor": name, "device": None}
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, list):
        return [pack(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [pack(item, tensors) for item in value]}
    if isinstance(value, set):
        return {"set": [pack(item, tensors) for item in sorted(value)]}
    if isinstance(value, dict):
        items = [[pack(k, tensors), pack(v, tensors)] for k, v in value.items()]
        return {"dict": items}
    raise TypeError(f"cannot keep a {type(value).__name__}")


def unpack(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `pack` was given, bit by bit; tensors on the device they had."""
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "float" in tree:
        return float.fromhex(tree["float"])
    if "tensor" in tree:
        tensor = tensors[tree["tensor"]]
        return tensor.numpy() if tree["device"] is None else tensor.to(tree["device"])
    if "tuple" in tree:
        return tuple(unpack(tree["tuple"], tensors))
    if "set" in tree:
        return set(unpack(tree["set"], tensors))
    return {unpack(k, tensors): unpack(v, tensors) for k, v in tree["dict"]}


def _encode(key: Mapping[str, str], values: Mapping[str, Any]) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(pack(dict(values), tensors))
    metadata = {"format": FORMAT, "key": json.dumps(key), "tree": tree}
    return save(tensors, metadata | {"checksum": digest([metadata, tensors])})


def _read(path: Path, key: Mapping[str, str]) -> dict[str, Any]:
    """
    :raises RefusedEntry: unless the file is whole, unchanged, and of just this key
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            names = file.keys()  # it is no mapping, only its keys can be walked
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise RefusedEntry(f"it cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise RefusedEntry(
            f"it has format {metadata.get('format')!r}, this version reads {FORMAT!r}"
        )
    checksum = metadata.pop("checksum", None)
    if checksum != digest([metadata, tensors]):
        raise RefusedEntry("its content does not fit its checksum: it is damaged")
    try:
        recorded = json.loads(metadata["key"])
        differing = [part for part in key if recorded.get(part) != key[part]]
        found = unpack(json.loads(metadata["tree"]), tensors)
    except Exception as error:  # a file of others may hold anything; torch's devices
        raise RefusedEntry(f"it cannot be understood: {error!r}") from error
    if differing:
        others = " and another ".join(differing)
        raise RefusedEntry(f"it was measured with another {others}")
    return found


def _check_names(found: Any, like: Mapping[str, Any]) -> None:
    """
    Nothing but what was asked for is taken.

    :raises RefusedEntry: if names or types are others
    """
    if not isinstance(found, dict) or found.keys() != like.keys():
        raise RefusedEntry(f"it does not hold just {', '.join(like)}")
    wrong = [name for name in like if type(found[name]) is not type(like[name])]
    if wrong:
        raise RefusedEntry(f"{', '.join(wrong)} in it is of another type")
