"""integration/benchmarks/quality.py: which runs are repeated, and what tables say."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.benchmarks import imported


@pytest.fixture(scope="module")
def quality() -> Iterator[ModuleType]:
    with imported("quality") as script:
        yield script


def test_windows_of_other_lengths_are_texts_of_their_own(
    quality: ModuleType, options: Namespace
) -> None:
    done = [finished(quality, options)]
    (path,) = options.eval_text
    options.eval_seq_len = [256, 512]
    named = {"wiki.txt": (path, 256), "wiki.txt by 512": (path, 512)}
    assert quality.eval_texts(options) == named
    assert left(quality, options, done)[0]  # of the second nothing is known
    done[0]["texts"]["wiki.txt by 512"] = done[0]["texts"]["wiki.txt"]
    assert not left(quality, options, done)[0]


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    """Of a command with one run."""
    calibration, held_out = tmp_path / "c4.jsonl", tmp_path / "wiki.txt"
    calibration.write_text("calibration")
    held_out.write_text("held out")
    return Namespace(
        model="models/A",
        text=calibration,
        eval_text=[held_out],
        samples=24,
        seq_len=256,
        dtype="float32",
        windows=8,
        eval_seq_len=[],
        methods=["uniform"],
        allocators=["owl"],
        pruners=["wanda"],
        sparsities=[0.6],
        seeds=[0],
    )


def finished(quality: ModuleType, options: Namespace) -> dict:
    """The line that the one run of a command leaves."""
    (cell,) = quality.cells(options)
    texts = {
        path.name: {"perplexity": 9.0, "tokens": 8, "digest": quality.digest(path)}
        for path in options.eval_text
    }
    return cell | {"texts": texts, "commit": "f00"}


def left(
    quality: ModuleType, options: Namespace, done: list[dict]
) -> tuple[list[dict], list[dict]]:
    """What is to be run, and the lines that are kept."""
    serving = quality.serving(options, [], done)
    return quality.to_run(quality.cells(options), serving)


def line(method: str, perplexity: float, **other: Any) -> dict:
    """As an older version has written it: without windows, digests and commit."""
    return {
        "model": "A",
        "text": "c4.jsonl",
        "samples": 24,
        "seq_len": 11,
        "dtype": "float32",
        "pruner": "wanda",
        "sparsity": 0.6,
        "method": method,
        "allocator": "-" if method in ("uniform", "evolution") else "owl",
        "seed": 0,
        "texts": {"wiki.txt": {"perplexity": perplexity, "tokens": 80}},
        "seconds": 1.0,
        **other,
    }


def test_a_run_is_not_repeated(quality: ModuleType, options: Namespace) -> None:
    done = [finished(quality, options)]
    assert left(quality, options, done) == ([], done)
    assert "f00; this is f01" in quality.other_code(done, "f01")
    assert quality.other_code(done, "f00") == ""


@pytest.mark.parametrize(
    "field, value", [("windows", 9), ("samples", 25), ("dtype", "bfloat16")]
)
def test_other_settings_are_another_run(
    quality: ModuleType, options: Namespace, field: str, value: object
) -> None:
    done = [finished(quality, options)]
    setattr(options, field, value)
    missing, kept = left(quality, options, done)
    assert len(missing) == 1 and not kept


@pytest.mark.parametrize("name", ["c4.jsonl", "wiki.txt"])
def test_other_content_under_the_same_name_is_another_run(
    quality: ModuleType, options: Namespace, name: str
) -> None:
    done = [finished(quality, options)]
    (options.text.parent / name).write_text("something else")
    missing, kept = left(quality, options, done)
    assert len(missing) == 1 and not kept


def test_what_is_known_by_less_is_run_again(
    quality: ModuleType, options: Namespace
) -> None:
    missing, _ = left(quality, options, [line("uniform", 100.0)])
    assert len(missing) == 1


OTHERWISE: list[dict] = [
    {"samples": 64},
    {"dtype": "bfloat16"},
    {"text_digest": "f00"},
    {"texts": {"wiki.txt": {"perplexity": 60.0, "tokens": 90}}},
    {"texts": {"wiki.txt": {"perplexity": 60.0, "tokens": 80, "digest": "f00"}}},
]


@pytest.mark.parametrize("other", OTHERWISE)
def test_settings_have_a_table_each(
    quality: ModuleType, capsys: pytest.CaptureFixture, other: dict
) -> None:
    one = [line("base", 90.0), line("ours", 45.0)]
    quality.print_tables([*one, line("ours", 60.0, **other)])
    first, second = capsys.readouterr().out.split("### A\n")[1:]
    assert "| 90.0 | – | 45.0 | -50.0% |" in first and "60.0" not in first
    assert "| – | – | 60.0 | – |" in second


def test_older_lines_have_a_table(
    quality: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    quality.print_tables([line("base", 90.0), line("ours", 45.0)])
    printed = capsys.readouterr().out
    assert "24 × 11 tokens of c4.jsonl, float32, perplexity on 80 tokens" in printed
    assert "Commit unknown." in printed


def test_all_models_have_a_row_whatever_was_run(quality: ModuleType) -> None:
    lines = {
        "A": [line("uniform", 100.0), line("base", 90.0), line("ours", 45.0)],
        "B": [line("base", 80.0), line("evolution", 30.0), line("ours", 60.0)],
        "C": [line("base", 80.0)],
    }
    models = {name: quality.Results(own, "wiki.txt") for name, own in lines.items()}
    head, _, row = quality.summary(models).splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["vs base"] == "-38.8% (2)"  # sqrt(45 / 90 · 60 / 80) − 1
    assert cells["vs uniform"] == "-55.0% (1)"
    assert cells["vs ATP"] == "–"
    assert cells["vs evolution"] == "+100.0% (1)"
    assert cells["worst vs base"] == "-25.0%"
