"""integration/benchmarks/quality_target.py: what is compared with what."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.benchmarks import imported


@pytest.fixture(scope="module")
def target() -> Iterator[ModuleType]:
    with imported("quality_target") as script:
        yield script


def line(increase: float, sparsity: float, **other: Any) -> dict:
    """As an older version has written it: without windows, digests and commit."""
    return {
        "model": "A",
        "text": "c4.jsonl",
        "eval_text": "wiki.txt",
        "samples": 24,
        "seq_len": 256,
        "dtype": "float32",
        "pruner": "wanda",
        "seed": 0,
        "increase": increase,
        "sparsity": sparsity,
        "seconds": 1.0,
        **other,
    }


def bound(increase: float, **other: Any) -> dict:
    return line(increase, 0.5, bound=0.3, effort="standard", **other)


def uniform(increase: float, sparsity: float, **other: Any) -> dict:
    return line(increase, sparsity, uniform=sparsity, **other)


def test_uniform_is_interpolated_from_the_dense_model_on(target: ModuleType) -> None:
    lines = [uniform(0.4, 0.4), uniform(0.2, 0.3)]
    assert target.uniform_at(lines, bound(0.2)) == "30.0%"
    assert target.uniform_at(lines, bound(0.4)) == "40.0%"
    # of the logarithm: a half of the way from 0.2 to 0.4
    assert target.uniform_at(lines, bound(0.08**0.5)) == "35.0%"
    assert target.uniform_at(lines, bound(0.1)) == "15.0%"
    assert target.uniform_at(lines, bound(0.5)) == "–"


def test_uniform_that_lowers_the_loss_comes_before_dense(target: ModuleType) -> None:
    lines = [uniform(-0.1, 0.1), uniform(0.2, 0.3)]
    assert target.uniform_at(lines, bound(0.1)) == "23.3%"
    for nothing in (0.0, -0.05):
        assert target.uniform_at(lines, bound(nothing)) == "–"


def test_uniform_of_another_pruner_or_seed_does_not_count(target: ModuleType) -> None:
    lines = [uniform(0.4, 0.4, pruner="sparsegpt"), uniform(0.4, 0.4, seed=1)]
    assert target.uniform_at(lines, bound(0.3)) == "–"


@pytest.mark.parametrize(
    "other", [{"dtype": "bfloat16"}, {"windows": 9}, {"eval_digest": "f00"}]
)
def test_settings_have_a_table_each(
    target: ModuleType, capsys: pytest.CaptureFixture, other: dict
) -> None:
    target.print_tables([bound(0.3), uniform(0.4, 0.4, **other)])
    first, _ = capsys.readouterr().out.split("### A\n")[1:]
    assert "| +0.300 | yes | – |" in first


def test_a_run_is_known_by_its_settings(target: ModuleType, tmp_path: Path) -> None:
    for name in ("c4.jsonl", "wiki.txt"):
        (tmp_path / name).write_text(name)
    options = Namespace(
        model="models/A",
        text=tmp_path / "c4.jsonl",
        eval_text=tmp_path / "wiki.txt",
        samples=24,
        seq_len=256,
        dtype="float32",
        windows=8,
        pruners=["wanda"],
        seeds=[0],
        bounds=[0.3],
        uniform=[0.4],
        effort="standard",
        quantize=[],
    )
    done = [cell | {"commit": "f00"} for cell in target.cells(options)]
    assert target.to_run(target.cells(options), done) == ([], done)
    options.windows = 9
    assert len(target.to_run(target.cells(options), done)[0]) == 2
    options.windows = 8
    options.eval_text.write_text("something else")
    assert len(target.to_run(target.cells(options), done)[0]) == 2


def test_what_is_quantised_is_compared_with_its_like(target: ModuleType) -> None:
    lines = [uniform(0.4, 0.4), uniform(0.4, 0.3, quantize="w8a8")]
    lines += [uniform(0.2, 0.2, quantize="w8a8")]
    assert target.uniform_at(lines, bound(0.4)) == "40.0%"
    assert target.uniform_at(lines, bound(0.4, quantize="w8a8")) == "30.0%"
    assert "| wanda + w8a8 |" in target.table([bound(0.4, quantize="w8a8")])
