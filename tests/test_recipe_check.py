"""integration/recipe_check.py: recipes are run as they are, or as the line says."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from helpers import tiny

from absorb_plugin.evaluation.oneshot import load_recipe

FOLDER = Path(__file__).parents[1] / "integration"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module("recipe_check")
    sys.modules.pop("recipe_check")


@pytest.mark.parametrize("hidden, size", [(128, None), (64, 64), (96, 32)])
def test_groups_divide_the_widths(
    script: ModuleType, tmp_path: Path, hidden: int, size: int | None
) -> None:
    model = tiny.make_model(
        "llama", hidden_size=hidden, intermediate_size=256, num_attention_heads=4
    )
    model.save_pretrained(tmp_path / "model")
    for recipe in sorted(script.RECIPES.glob("*.yaml")):
        found, remark = script.fitting(recipe, tmp_path / "model", tmp_path)
        if size is None or "w4a16" not in recipe.name:
            assert (found, remark) == (recipe, "")
            continue
        assert remark == f", groups of {size}"
        *_, quantisation = load_recipe(found).modifiers
        scheme = quantisation.config_groups["group_0"]
        assert scheme.weights.group_size == size and scheme.weights.num_bits == 4
        assert quantisation.ignore == load_recipe(recipe).modifiers[-1].ignore
