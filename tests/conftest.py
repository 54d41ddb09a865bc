"""Fixtures of all tests: a clean session of llm-compressor, tiny models, text."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.words import make_model, make_tokenizer, words
from llmcompressor.core import reset_session
from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import absorb_plugin  # noqa: F401  registers the modifier

# The models are tiny: a second thread costs more than it brings, in processes that
# tests start too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def clean_session() -> Iterator[None]:
    """llm-compressor keeps the recipe of the last run in a global session."""
    reset_session()
    yield
    reset_session()


@pytest.fixture(params=list(tiny.ARCHITECTURES))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model of every architecture, one after the other."""
    return tiny.make_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny.make_model("llama")


@pytest.fixture
def llama_for_oneshot(
    tmp_path: Path,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return tiny.with_tokenizer(tiny.make_model("llama"), tmp_path / "config")


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is said at level WARNING or above."""
    yield from _messages("WARNING", "{message}")


@pytest.fixture
def logs() -> Iterator[list[str]]:
    """What is said at level INFO or above, with the level in front."""
    yield from _messages("INFO", "{level} {message}")


def _messages(level: str, template: str) -> Iterator[list[str]]:
    seen: list[str] = []
    sink = logger.add(seen.append, level=level, format=template)
    yield seen
    logger.remove(sink)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-llama")
    make_model().save_pretrained(path)
    make_tokenizer(bos=True).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(400))
    return path


@pytest.fixture(scope="session")
def wanda_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "wanda.yaml"
    path.write_text(
        "prune_stage:\n"
        "  prune_modifiers:\n"
        "    WandaPruningModifier:\n"
        "      sparsity: 0.5\n"
        '      targets: ["Linear"]\n'
        '      ignore: ["re:.*lm_head"]\n'
    )
    return path
