"""Whether llm-compressor's pipelines run a model as the model runs by itself."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runs, tiny
from torch.nn import Module
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks
from absorb_plugin.pruners.traced import keep_causal_masks

LOST = ["mistral", "phi3", "mixtral", "qwen3_moe", "starcoder2", "phimoe"]
KEPT = ["llama", "qwen3", "gemma3", "opt"]


def outputs(name: str, recipe: list[Any], directory: Path) -> list[torch.Tensor]:
    """Of the first block, when the model runs by itself and when it is calibrated."""
    model, seen = tiny.make_model(name), []
    samples = tiny.make_dataset(1)
    row = {k: torch.tensor([samples[0][k]]) for k in ("input_ids", "attention_mask")}

    def note(module: Module, args: Any, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        seen.append(found.detach().clone())

    find_blocks(model).modules[0].register_forward_hook(note)
    with torch.no_grad():
        model(**row)
    runs.run(model, recipe, directory, dataset=samples, samples=1)
    return [seen[0], seen[1]]


def make_mistral(sliding: int | None) -> PreTrainedModel:
    model = tiny.make_model("mistral")
    model.config.sliding_window = sliding
    return model


class Undecided(Module):
    """What tells nothing without being run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        make_mask = torch.triu
        if len(x) > 1:
            make_mask = torch.tril
        return make_mask(x, attention_mask=None)


def is_given(model: PreTrainedModel) -> bool:
    return hasattr(sys.modules[type(model).__module__], "mask_function")


@pytest.mark.contract
@pytest.mark.parametrize("name", LOST)
def test_llm_compressor_alone_loses_the_causal_mask(name: str, tmp_path: Path) -> None:
    """Where this fails, it has learnt to trace them, and `keep_causal_masks` can go."""
    alone, calibrated = outputs(name, [runs.pruner(sparsity=0.1)], tmp_path)
    assert (alone - calibrated).abs().max() > 0.1


@pytest.mark.contract
@pytest.mark.parametrize("name", [*LOST, *KEPT])
def test_with_us_it_is_kept(name: str, warnings: list[str], tmp_path: Path) -> None:
    ours = runs.absorption(allocator="uniform", strength=0)
    alone, calibrated = outputs(name, [ours, runs.pruner(sparsity=0.1)], tmp_path)
    # the first that comes is of the whole model, before anything is pruned
    torch.testing.assert_close(alone, calibrated, rtol=1e-4, atol=1e-4)
    said = [message for message in warnings if "causal mask" in message]
    # a replay has no such help
    assert ["Replayed by" in message for message in said] == [True] * (name in LOST)
    assert not is_given(tiny.make_model(name))


@pytest.mark.parametrize("sliding", [None, 4])
def test_the_function_is_the_one_that_the_model_chooses(sliding: int | None) -> None:
    model = make_mistral(sliding)
    home = sys.modules[type(model).__module__]
    kind = "causal" if sliding is None else "sliding_window_causal"
    undo = keep_causal_masks(model, find_blocks(model).modules)
    assert home.mask_function.__name__ == "mask_function"
    (found,) = home.mask_function.by_config.values()
    assert found is getattr(home, f"create_{kind}_mask")
    undo()
    assert not is_given(model)


def test_models_of_one_module_may_choose_differently(warnings: list[str]) -> None:
    models = list(map(make_mistral, (None, 4)))
    home, asked = sys.modules[type(models[0]).__module__], []
    undo = keep_causal_masks(torch.nn.ModuleList(models), [])
    for config in home.mask_function.by_config:
        name = home.mask_function.by_config[config].__name__
        home.mask_function.by_config[config] = lambda n=name, **_: asked.append(n)
    for model in models[::-1]:
        home.mask_function(config=model.config)
    assert asked == ["create_sliding_window_causal_mask", "create_causal_mask"]
    undo()
    assert not warnings and not is_given(models[0])


def test_a_refused_recipe_leaves_nothing_behind(tmp_path: Path) -> None:
    recipe = [runs.absorption(ignore=["re:.*"]), runs.pruner()]
    with pytest.raises(ValueError, match="would prune no Linear"):
        runs.run(make_mistral(4), recipe, tmp_path)
    assert not is_given(make_mistral(4))


def test_what_a_run_that_broke_off_left_is_replaced() -> None:
    keep_causal_masks(make_mistral(4), [])
    model = make_mistral(None)
    undo = keep_causal_masks(model, [])
    (found,) = sys.modules[type(model).__module__].mask_function.by_config.values()
    assert found.__name__ == "create_causal_mask"
    undo()


def test_a_variable_of_two_values_is_told(warnings: list[str]) -> None:
    keep_causal_masks(Undecided(), [])()
    assert len(warnings) == 1
    assert "Undecided chooses the function that makes its causal mask" in warnings[0]


def test_a_class_without_source(warnings: list[str]) -> None:
    kind: dict[str, Any] = {}
    exec("import torch\nclass Odd(torch.nn.Module):\n    pass", kind)

    class Within(torch.nn.Module):
        """
        Whose source cannot be parsed by itself: attention_mask
        """

    for one in (kind["Odd"], Within):
        keep_causal_masks(one(), [])()
    assert not warnings


def test_a_run_that_fails_takes_it_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def fail(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        seen.append(is_given(model))
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("absorb_plugin.allocate.allocate", fail)
    model = make_mistral(4)
    with pytest.raises(RuntimeError, match="on purpose"):
        runs.run(model, [runs.absorption(), runs.pruner()], tmp_path)
    assert seen == [True] and not is_given(model)
