"""Ranks of torch.distributed against one process, see helpers/ranks.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ranks

from absorb_plugin.distributed import _bytes, fail_together

ROOT = Path(__file__).parent.parent
PATIENCE = 1800.0  # seconds, of a slow machine with other work
SEVERAL = [world for world in ranks.WORLDS if world > 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ranks.py has left its findings; it runs once for all workers of xdist."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        path = tmp_path_factory.mktemp("ranks")
    else:
        path = tmp_path_factory.getbasetemp().parent / f"ranks-{run}"
        try:
            path.mkdir()
        except FileExistsError:
            return _awaited(path)
    said = "the worker that ran them has ended"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "helpers.ranks", str(path)],
            env=dict(
                os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])
            ),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        said = done.stderr[-5000:] if done.returncode else ""
    finally:
        (path / ".said").write_text(said)
        (path / ".said").rename(path / "said")
    return _awaited(path)


def _awaited(path: Path) -> Path:
    deadline = time.monotonic() + PATIENCE
    while not (path / "said").exists():
        assert time.monotonic() < deadline, "the worker that runs the ranks is gone"
        time.sleep(0.5)
    assert (path / "said").read_text() == ""
    return path


def found(folder: Path, what: str, world: int) -> list[dict[str, Any]]:
    """What every rank found."""
    paths = [folder / f"{name}.json" for name in ranks.ranks_of(world)]
    return [json.loads(path.read_text())[what] for path in paths]


def pruned(folder: Path, world: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}.pt") for name in ranks.ranks_of(world)]


def measured(entry: dict[str, Any]) -> np.ndarray:
    """What judged an allocation, the noise, and what it costs."""
    names = ("noise", "losses", "confirmed", "costs")
    parts = [entry[what] or [] for what in names]
    return np.concatenate(parts).astype(float)


@pytest.mark.parametrize("world", SEVERAL)
def test_the_allocation_of_one_process(folder: Path, world: int) -> None:
    (alone,) = found(folder, "allocations", 1)
    several = found(folder, "allocations", world)
    assert len(several[0]) == len(alone) + len(ranks.SCHEMES) - 1
    for case in several[0]:
        reference = alone[f"{case.split(',')[0]}, unequal"]
        assert np.ptp(reference["targets"]) > 1e-3, case
        for entry in several:
            # every rank the identical list
            assert entry[case]["targets"] == several[0][case]["targets"], case
            direction = np.array(reference["direction"] or [0.0])
            largest = np.abs(direction).max()
            for mine, its, off in (
                (entry[case]["targets"], reference["targets"], 1e-6),
                # of SparseGPT's slopes Hessians are added up in another order, on one
                # rank or, for several, on all
                (entry[case]["direction"] or [0.0], direction, 4e-6 * largest),
                (measured(entry[case]), measured(reference), 1e-6),
            ):
                np.testing.assert_allclose(mine, its, rtol=0, atol=off, err_msg=case)
            assert entry[case]["steps"] == reference["steps"], case
            assert entry[case]["taken"] == reference["taken"], case
    # of three blocks, for the signal and, where ranks are more than they, for both that
    # are judged
    of_judges = 6 if world == 3 else 0
    assert several[0]["wide, unequal"]["factored"] == 3 + of_judges
    assert not several[0]["confirmed, unequal"]["factored"]
    assert alone["auto, unequal"]["steps"] > 0
    assert abs(alone["bounded, unequal"]["costs"][0]) > 1e-3
    assert alone["confirmed, unequal"]["taken"] == "searched"


@pytest.mark.parametrize("world", ranks.WORLDS)
def test_every_rank_finds_its_own_measurements_again(folder: Path, world: int) -> None:
    measured = [entry["auto, unequal"] for entry in found(folder, "allocations", world)]
    for entry, (first, second) in zip(measured, found(folder, "kept", world)):
        assert first == second == entry


@pytest.mark.parametrize("world", SEVERAL)
def test_what_fails_on_one_rank_fails_on_all(folder: Path, world: int) -> None:
    said = found(folder, "failures", world)
    last = world - 1
    for number, entry in enumerate(said):
        assert "has no 'input_ids' but ['text']" in entry["no input_ids"]
        assert "report_dir" in entry["no directory"]
        told = entry["no directory"].startswith("OtherRankFailed: rank 1 of torch.")
        assert told == (number != 1)
        if number != last:
            assert f"rank {last} of torch.distributed" in entry["no input_ids"]
        assert entry["no data"].startswith("ValueError: no calibration data")
        assert "ValueError: no calibration data" in entry["no loader"]
        assert "NonFiniteHiddenState: block model.layers.0" in entry["infinity"]
        assert "given different calibration samples" in entry["not alike"]
        kinds = {"allocator": "PluginError", "metric": "ValueError"}
        for case, kind in (kinds | {"tried again": "PluginError"}).items():
            told = f"OtherRankFailed: rank {last} of torch.distributed failed: {kind}"
            told = "PluginError: allocator 'owl'" if number == last else told
            assert entry[case].startswith(told) and "no metric" in entry[case]
        assert "no outliers" in entry["metric in other words"]
    culprits = [x["infinity"].startswith("NonFinite") for x in said]
    assert sum(culprits) == 1


def test_an_error_that_takes_no_mark_is_raised_as_it_is() -> None:
    class Sealed(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            if not name.startswith("__"):
                raise TypeError(f"{name} cannot be set")
            super().__setattr__(name, value)

    with pytest.raises(Sealed), fail_together(), fail_together():
        raise Sealed


def test_a_matrix_of_one_entry_goes_over_the_group() -> None:
    """As of columns that were turned: contiguous, whatever its stride is."""
    matrix = torch.empty_strided((1, 1), (1, 7))
    _bytes(matrix).zero_()
    assert matrix.is_contiguous() and matrix.item() == 0.0


USED = {
    "no room for slopes": "gradient",
    "no room to judge": "confirmed",
    "no room for all": "confirmed",
}


@pytest.mark.parametrize("world", SEVERAL)
def test_ranks_stay_in_step(folder: Path, world: int) -> None:
    alone = found(folder, "allocations", 1)[0]
    said = found(folder, "in step", world)
    for number, entry in enumerate(said):
        for case in (case for case in entry if case.startswith("no room ")):
            name = USED.get(case, "pruner")
            expected = alone[f"{name}, unequal"]["targets"]
            np.testing.assert_allclose(entry[case]["targets"], expected, 0, 1e-6)
        plain, halved = entry["no room, even"]
        np.testing.assert_allclose(halved, plain, rtol=0, atol=1e-6)
        for case in ("lsa", "confirmed"):
            before, after = entry[f"{case}, changed"]
            assert before == after
        for case in ("slopes", "judge"):
            other = f"OtherRankFailed: rank {world - 1} of torch.distributed failed: "
            told = "" if number == world - 1 else other
            assert entry[case] == f"{told}ValueError: no way"
        first, second = entry["kept by some"]
        assert first == second
        here = ["here"] * world
        assert entry["joined"] == [[True, here], [False, here]]


def test_ranks_with_a_card_each(folder: Path) -> None:
    """Whether the weights lie on it or away from it."""
    alone = found(folder, "allocations", 1)[0]
    for entry in found(folder, "on cards", 2):
        assert entry.keys() == ranks.ON_CARDS.keys()
        for case, one in entry.items():
            expected = alone[f"{case}, unequal"]["targets"]
            np.testing.assert_allclose(one["targets"], expected, 0, 5e-6, case)
            assert one["exchanged"] > 0


def agreement(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Share of weights that are zero in both or in neither."""
    weights = one["weights"]
    assert weights.keys() == other["weights"].keys()
    same = [((w == 0) == (other["weights"][name] == 0)) for name, w in weights.items()]
    return sum(int(x.sum()) for x in same) / sum(x.numel() for x in same)


def assert_identical(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        for name, weight in entry["weights"].items():
            assert torch.equal(weight, entries[0]["weights"][name])


@pytest.mark.parametrize("kind", list(ranks.runs.PRUNERS))
def test_pruners_see_the_samples_of_all_ranks(folder: Path, kind: str) -> None:
    (alone,), two = pruned(folder, 1), pruned(folder, 2)
    alone = alone[f"{kind}, reduced"]
    reduced = [entry[f"{kind}, reduced"] for entry in two]
    left = [entry[f"{kind}, as they are"] for entry in two]
    np.testing.assert_allclose(
        reduced[0]["targets"], alone["targets"], rtol=0, atol=1e-6
    )
    assert_identical(reduced)
    assert agreement(reduced[0], alone) >= 0.999
    assert agreement(left[0], alone) < 0.99
    assert left[0]["targets"] == left[1]["targets"] == reduced[0]["targets"]


def test_weights_in_memory_that_the_ranks_share(folder: Path) -> None:
    (alone,), two = pruned(folder, 1), pruned(folder, 2)
    shared = [entry["offloaded"] for entry in two]
    assert_identical(shared)
    assert agreement(shared[0], alone["sparsegpt, reduced"]) >= 0.999


def test_experts_that_the_ranks_share_are_saved_as_they_are(folder: Path) -> None:
    assert found(folder, "packed", 2) == [[], []]


def test_a_rank_without_samples_prunes_as_the_others(folder: Path) -> None:
    (alone,), several = pruned(folder, 1), pruned(folder, 3)
    entries = [entry["one empty"] for entry in several]
    assert_identical(entries)
    assert agreement(entries[0], alone["one empty"]) >= 0.999


@pytest.mark.parametrize("world", [1, 3])
def test_the_first_rank_alone_writes_and_tells(folder: Path, world: int) -> None:
    first, *others = (entry["one empty"] for entry in pruned(folder, world))
    assert first["reports"] == ["profile.json", "profile.png", "report.html"]
    assert first["hooks"] == 1
    assert all(entry["reports"] == [] and entry["hooks"] == 0 for entry in others)
