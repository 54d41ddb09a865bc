"""
What a measurement depends on, as SHA-256 digests: the weights, the samples, the
arguments of a probe, and the code that measures.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import is_dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.offload import disable_onloading, get_execution_device
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb_plugin._llmcompressor import get_calibrate_all_experts_flag
from absorb_plugin.blocks import BlockMap
from absorb_plugin.precision import reduced_precision

__all__ = ["device_name", "digest", "model_digest", "tensor_bytes", "weights_digest"]

# Their arithmetic is the measurement's.
PACKAGES = ("compressed-tensors", "llmcompressor", "numpy", "torch", "transformers")
# Folders and files of this package that a measurement does not depend on: what they
# choose is part of the key itself. A new one counts until it is named here.
NOT_MEASURING = {
    "__init__.py",
    "_after_import.py",
    "allocate.py",
    "allocation.py",
    "choices.py",
    "cli",
    "compressed.py",
    "evaluation",
    "files.py",
    "hookspecs.py",
    "method.py",
    "mistakes.py",
    "modifier.py",
    "names.py",
    "overflow.py",
    "plugins.py",
    "report",
    "sample_split.py",
    "search",
    "settings.py",
}
# Packages whose hooks and forwards change where weights lie, not what is computed.
NEUTRAL = ("absorb_plugin", "accelerate", "compressed_tensors", "llmcompressor")
# hashlib lets other threads run while it works; so many tensors are in memory at once.
THREADS = 4


def digest(value: object) -> str:
    """
    :param value: numbers, strings, tensors, arrays, BlockMaps, and lists, mappings and
        sets of them
    :return: hexadecimal; equal exactly where the values are, bit by bit
    :raises TypeError: for a type whose identity is not known here
    """
    hasher = hashlib.sha256()
    for part in _parts(value):
        # lengths keep ("ab", "c") and ("a", "bc") apart
        hasher.update(len(part).to_bytes(8, "big"))
        hasher.update(part)
    return hasher.hexdigest()


def model_digest(model: PreTrainedModel) -> str:
    """
    Everything about the model and the software that a measurement's result depends on:
    all weights and buffers, configuration, how attention is computed, whether experts
    see all tokens, classes, numbers, flags (a LoRA's scaling) and hooks of all modules,
    name of the device, what it may round, versions, and the code here that measures.
    Neither the model's path nor the number of threads is part of it.
    """
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    return digest(
        {
            "class": type(model).__name__,
            # as text: a configuration may hold dtypes and nested configurations
            "config": repr(sorted(config.items())),
            "attention": getattr(model.config, "_attn_implementation", None),
            "all experts": get_calibrate_all_experts_flag(),
            "modules": _computing(model),
            "device": device_name(torch.device(get_execution_device(model))),
            "precision": reduced_precision(),
            "weights": weights_digest(model),
            "versions": [f"{name} {version(name)}" for name in PACKAGES],
            "code": [path.read_bytes() for path in _sources()],
        }
    )


def device_name(device: torch.device) -> str:
    """As its maker calls it; two kinds of GPU round differently."""
    module = torch.get_device_module(device)
    name = getattr(module, "get_device_name", None)
    return device.type if name is None else f"{device.type} {name(device)}"


def weights_digest(model: torch.nn.Module) -> str:
    """
    Over the bytes of all parameters and buffers; each is read once, offloaded ones
    where they lie, without a detour through the accelerator.

    :raises ValueError: if weights are on the meta device
    """
    found: dict[str, str] = {}
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(desc="Hashing weights", unit="B", unit_scale=True) as bar,
    ):
        tensors = _tensors(model)
        while window := list(islice(tensors, THREADS)):
            names, values = zip(*window)
            found |= dict(zip(names, pool.map(digest, values), strict=True))
            bar.update(sum(x.numel() * x.element_size() for x in values))
    return digest(found)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor, in row order."""
    flat = tensor.detach().cpu().contiguous().flatten()
    if not flat.numel():
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def _parts(value: object) -> Iterator[bytes | memoryview]:
    yield type(value).__name__.encode()
    if isinstance(value, float):
        yield value.hex().encode()
    elif value is None or isinstance(value, bool | int | str):
        yield str(value).encode()
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield tensor_bytes(value)
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, BlockMap):
        # the weights themselves are part of the model's digest
        yield from _parts([[b.name, list(b.linears)] for b in value.blocks])
    elif isinstance(value, ExitStack):
        pass  # holds what is in force at the moment, no parameter
    elif hasattr(value, "identity"):
        yield from _parts(value.identity())
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _parts(vars(value))
    elif isinstance(value, Mapping):
        yield from _all([k, value[k]] for k in sorted(value, key=repr))
    elif isinstance(value, set | frozenset):
        yield from _all(sorted(value, key=digest))
    elif isinstance(value, list | tuple):
        yield from _all(value)
    else:
        raise TypeError(f"cannot tell what makes two {type(value).__name__} equal")


def _all(values: Iterable[object]) -> Iterator[bytes | memoryview]:
    values = list(values)
    yield str(len(values)).encode()
    for value in values:
        yield from _parts(value)


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        # read anew each time: an offloaded module's mapping is a cache of its own
        for name in [*module._parameters, *module._buffers]:
            with disable_onloading():
                tensor = getattr(module, name)
            if tensor is None:
                continue
            if tensor.is_meta:  # offloaded to disk
                tensor = getattr(module, name)
            if tensor.is_meta:
                raise ValueError(
                    f"profile_cache cannot hash {prefix}.{name}, whose weights are on "
                    "the meta device: load the model with load_offloaded_model() of "
                    "compressed_tensors.offload, or leave profile_cache out"
                )
            yield f"{prefix}.{name}", tensor


def _computing(model: torch.nn.Module) -> dict[str, list[object]]:
    """
    Of every module, by name, what of its computing no weight tells: its class, numbers
    and flags among its attributes, hooks, and a forward of its own.
    """
    return {
        prefix: [
            f"{type(module).__module__}.{type(module).__qualname__}",
            _attributes(module),
            [_code(hook) for hook in _foreign_functions(module)],
        ]
        for prefix, module in model.named_modules()
    }


def _attributes(module: torch.nn.Module) -> object:
    if isinstance(module, PreTrainedModel):  # of which a path is one
        return None
    known = vars(torch.nn.Module()).keys()
    own = {k: v for k, v in vars(module).items() if k not in known}
    if type(module).__module__.split(".")[0] not in ("torch", "transformers"):
        return _plain(own)
    # what else these have follows from the configuration
    simple = bool | int | float | str
    return {
        name: value
        for name, value in own.items()
        if isinstance(value, simple) and not name.startswith("_")
    }


def _foreign_functions(module: torch.nn.Module) -> list[Any]:
    """Hooks and a replaced forward, but those of libraries that keep what it does."""
    found = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    found += [vars(module)["forward"]] if "forward" in vars(module) else []
    return [
        function
        for function in found
        # of what is written in C it is None
        if str(getattr(function, "__module__", None)).split(".")[0] not in NEUTRAL
    ]


def _code(function: Any) -> object:
    """What tells two functions apart: what they do, and the values that they hold."""
    if isinstance(function, partial):
        given = [_plain(function.args), _plain(function.keywords)]
        return [_code(function.func), *given]
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return [type(function).__qualname__, _plain(getattr(function, "__dict__", {}))]
    cells = getattr(function, "__closure__", None) or ()
    held = [_plain(cell.cell_contents) for cell in cells]
    numbers = [_plain(one) for one in code.co_consts]
    return [function.__qualname__, code.co_code, list(code.co_names), numbers, held]


def _plain(value: Any) -> Any:
    """What of it can be told apart; in place of anything else its type."""
    if isinstance(value, Mapping):
        return {repr(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, np.generic):
        return value.item()
    meta = isinstance(value, torch.Tensor) and value.is_meta
    if isinstance(value, torch.Tensor | np.ndarray) and not meta:
        return value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__qualname__


def _sources() -> list[Path]:
    # a version number would stand still while the code is worked on
    package = Path(__file__).parent
    return sorted(
        path
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] not in NOT_MEASURING
    )
