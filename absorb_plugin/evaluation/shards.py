"""A saved checkpoint, read tensor by tensor from its safetensors files."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from absorb_plugin.files import check_pointer, json_object

__all__ = [
    "Checkpoint",
    "check_directory",
    "indexed_files",
    "open_safetensors",
    "weights_entry",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Of these transformers takes the first that is there.
WEIGHTS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
# How those end that a config may name.
NAMED = (".safetensors", ".safetensors.index.json")
# Elements of a tensor that are in memory at a time.
PIECE = 1 << 25


class Checkpoint:
    """
    Config and tensors of a directory that `save_pretrained` has written. Tensors are
    read when asked for and not kept. The files are those that transformers loads.

    :param directory: holds config.json and safetensors files
    :raises FileNotFoundError: if the directory, its config, or a file of weights is
        missing
    :raises ValueError: if it is no model (an adapter, Git LFS pointers), or a file is
        damaged or cut short
    """

    def __init__(self, directory: Path) -> None:
        check_directory(directory)
        self.directory = directory
        self.config = _read_json(directory / "config.json")
        entry = _safetensors_entry(directory)
        is_index = entry.suffix == ".json"
        self._files = indexed_files(entry) if is_index else [entry]
        self._opened = {path: open_safetensors(path) for path in self._files}
        self._home: dict[str, Path] = {}
        for path, file in self._opened.items():
            self._home |= dict.fromkeys(file.keys(), path)
        self.unread_index = None if is_index else _index_beside(directory, entry)
        if is_index:
            _check_index(entry, self._home)

    @property
    def bytes(self) -> int:
        """Size of all files of weights."""
        return sum(path.stat().st_size for path in self._files)

    @property
    def files(self) -> int:
        return len(self._files)

    @property
    def names(self) -> list[str]:
        """Full names of all tensors."""
        return sorted(self._home)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors writes it: "BF16", "I8", "F8_E4M3" ..."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        return self._opened[self._home[name]].get_tensor(name)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor of any size, some rows at a time."""
        shape = self.shape(name)
        if not shape:
            yield self.read(name)
            return
        row = max(1, torch.Size(shape[1:]).numel())
        step, tensor = max(1, PIECE // row), self._slice(name)
        for start in range(0, shape[0], step):
            yield tensor[start : start + step]

    def _slice(self, name: str) -> Any:
        return self._opened[self._home[name]].get_slice(name)


def check_directory(directory: Path) -> None:
    """
    :raises OSError: if it is none, or has no config.json
    :raises ValueError: if an adapter is in it
    """
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: no such directory")
    if not directory.is_dir():
        raise NotADirectoryError(
            f"{directory} is a file: name the directory that holds config.json"
        )
    if (directory / "config.json").is_file():
        return
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        base = _read_json(adapter).get("base_model_name_or_path") or "another model"
        raise ValueError(
            f"{directory} is an adapter for {base}, not a model: merge it into its "
            "base model, save, and give the result: PeftModel.from_pretrained(base, "
            "adapter).merge_and_unload().save_pretrained(DIRECTORY)"
        )
    raise FileNotFoundError(f"{directory} has no config.json: it is no model directory")


def _read_json(path: Path) -> dict[str, Any]:
    check_pointer(path)
    return json_object(path.read_bytes(), str(path))


def weights_entry(directory: Path) -> Path:
    """
    The file of weights, or the index of several, that transformers takes, whatever
    else is there.

    :raises FileNotFoundError: if there is none
    :raises ValueError: if config.json names one that transformers does not load
    """
    named = _read_json(directory / "config.json").get("transformers_weights")
    if named is not None:
        _check_named(directory, named)
    names = WEIGHTS if named is None else (named,)
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory} has no weights ({', '.join(names)})")


def _check_named(directory: Path, named: object) -> None:
    """As transformers does, which says so when it loads the model."""
    if isinstance(named, str) and named.endswith(NAMED):
        folder = os.path.abspath(directory)
        if Path(os.path.abspath(directory / named)).is_relative_to(folder):
            return
    raise ValueError(
        f"{directory / 'config.json'}: transformers_weights={named!r} must be a file "
        f"beside it that ends with {' or '.join(NAMED)}: correct it, or take it out, "
        f"and {SINGLE} or its index is read"
    )


def _safetensors_entry(directory: Path) -> Path:
    try:
        entry = weights_entry(directory)
    except FileNotFoundError:
        if any(re.search(r"-of-\d+", p.name) for p in directory.glob("*.safetensors")):
            raise FileNotFoundError(
                f"{directory} has weights in several files but no {INDEX}, and cannot "
                "be loaded without: copy it as well"
            ) from None
        raise
    if ".safetensors" not in entry.suffixes:
        raise FileNotFoundError(
            f"{directory} has no {SINGLE} and no {INDEX} ({entry.name} is another "
            "format: save it anew)"
        )
    return entry


def _index_beside(directory: Path, entry: Path) -> Path | None:
    """That nobody reads, for a single file goes before it."""
    index = directory / INDEX
    return index if entry.name == SINGLE and index.is_file() else None


def indexed_files(index: Path) -> list[Path]:
    """
    :raises FileNotFoundError: if it names files that are not beside it
    :raises ValueError: if it is no index, or a pointer of Git LFS
    """
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no object `weight_map`: download it again")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of {len(names)} files of weights "
            f"that {index.name} names: {', '.join(missing[:3])}"
            f"{' …' if missing[3:] else ''}. Download them again"
        )
    return [index.parent / name for name in names]


def open_safetensors(path: Path) -> Any:
    """:raises ValueError: if it is damaged, or a pointer of Git LFS"""
    check_pointer(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is damaged or cut short: {error}. "
            "Copy or download it again"
        ) from error


def _check_index(index: Path, home: dict[str, Path]) -> None:
    missing = [name for name in _read_json(index)["weight_map"] if name not in home]
    if missing:
        raise ValueError(
            f"{index} names {len(missing)} tensors that are in none of its "
            f"files, {missing[0]} for one: index and files are not of one model"
        )
