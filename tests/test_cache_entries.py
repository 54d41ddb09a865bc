"""Files in a cache that somebody else has put there."""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import tiny
from helpers.fake_accelerator import fake_accelerator
from safetensors.torch import load_file, save_file

from absorb_plugin import cache, fingerprint
from absorb_plugin.cache import ProfileCache
from absorb_plugin.calibration import Batch
from absorb_plugin.fingerprint import digest
from absorb_plugin.forward.probe import Probe


class Counting(Probe):
    """Measures 3 numbers."""

    state = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self.step = 1

    def measure(self) -> None:
        self._numbers += [1, 2, 3]


def run(folder: Path) -> tuple[Counting, int]:
    """What was measured, and how often."""
    kept, probe, runs = (
        ProfileCache(str(folder), tiny.make_model("llama")),
        Counting(),
        [],
    )

    def measure() -> None:
        runs.append(1)
        probe.measure()

    samples: list[Batch] = [tiny.make_batch(1)]
    kept.load_or_run("Counting", samples, probe, 1, measure)
    return probe, len(runs)


def forge(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    """Change an entry's header, and make its checksum fit."""
    with cache.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    metadata.pop("checksum")
    change(metadata)
    checksum = digest([metadata, tensors])
    save_file(tensors, path, metadata | {"checksum": checksum})


def tree(value: Any) -> Callable[[dict[str, str]], None]:
    return lambda metadata: metadata.update(tree=json.dumps(value))


def no_key(metadata: dict[str, str]) -> None:
    del metadata["key"]


FORGED = {
    "another attribute": tree({"dict": [["step", 7], ["_numbers", [4]]]}),
    "only another": tree({"dict": [["step", 7]]}),
    "another type": tree({"dict": [["_numbers", "many"]]}),
    "a list": tree([1, 2]),
    "no value": tree({"dict": [["_numbers"]]}),
    "unknown mark": tree({"class": "os.system"}),
    "missing tensor": tree({"dict": [["_numbers", {"tensor": "9", "device": None}]]}),
    "no json": lambda metadata: metadata.update(tree="{"),
    "key is a list": lambda metadata: metadata.update(key="[]"),
    "no key": no_key,
}


@pytest.mark.parametrize("forged", list(FORGED))
def test_a_forged_entry_is_measured_again(
    forged: str, tmp_path: Path, warnings: list[str]
) -> None:
    run(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    forge(path, FORGED[forged])
    probe, runs = run(tmp_path)
    assert runs == 1 and probe._numbers == [1, 2, 3] and probe.step == 1
    assert any("is not used" in message for message in warnings)


def test_an_entry_that_is_left_alone_is_used(tmp_path: Path) -> None:
    run(tmp_path)
    probe, runs = run(tmp_path)
    assert runs == 0 and probe._numbers == [1, 2, 3]


def test_the_directory_is_listed_once(tmp_path: Path) -> None:
    kept = ProfileCache(str(tmp_path), tiny.make_model("llama"))
    with patch.object(Path, "glob", side_effect=AssertionError):
        for linear in range(4):
            remember = kept.numbers_for("owner")(f"linear {linear}")
            assert remember("alpha", lambda: 2.0) == 2.0


def test_another_device_is_another_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model("llama")
    digests = []
    with fake_accelerator():
        model.to("fake:0")
        for name in ("Fake 1", "Fake 2", "Fake 2"):
            monkeypatch.setattr(
                torch.get_device_module("fake"), "get_device_name", lambda *_, n=name: n
            )
            digests.append(fingerprint.model_digest(model))
    assert digests[0] != digests[1] == digests[2]


@pytest.mark.parametrize("what", ["a pipe", "a circle", "a directory"])
def test_what_is_no_file_is_measured_again(
    what: str, tmp_path: Path, warnings: list[str]
) -> None:
    run(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.unlink()
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a circle":
        path.symlink_to(path)
    else:
        path.mkdir()
        (path / "file").touch()
    probe, runs = run(tmp_path)
    assert runs == 1 and probe._numbers == [1, 2, 3]
    assert any("it is no file" in message for message in warnings)


def test_numbers_of_long_names_are_kept_and_infinite_ones_are_not(
    tmp_path: Path, warnings: list[str]
) -> None:
    cache = ProfileCache(str(tmp_path), tiny.small())
    remember = cache.numbers_for("an allocator")("model.layers.0.mlp.down_proj")
    long, values = "ä metric of " + "many " * 60 + "words", iter([1.5, 2.5])
    assert remember(long, partial(next, values)) == 1.5
    assert remember(long, partial(next, values)) == 1.5
    assert not warnings
    unknown = iter([math.nan, 3.5])
    assert math.isnan(remember("sometimes", partial(next, unknown)))
    assert remember("sometimes", partial(next, unknown)) == 3.5
