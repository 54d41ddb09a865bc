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
    assert not [message for message in warnings if "causal mask" in message]
    assert not is_given(tiny.make_model(name))


@pytest.mark.parametrize("sliding", [None, 4])
def test_the_function_is_the_one_that_the_model_chooses(sliding: int | None) -> None:
    model = make_mistral(sliding)
    home = sys.modules[type(model).__module__]
    kind = "causal" if sliding is None else "sliding_window_causal"
    undo = keep_causal_masks(model, find_blocks(model).modules)
    again = keep_causal_masks(model, find_blocks(model).modules)
    assert home.mask_function.__wrapped__ is getattr(home, f"create_{kind}_mask")
    assert home.mask_function.__name__ == "mask_function"
    again()
    assert is_given(model)
    undo()
    assert not is_given(model)


def test_models_that_choose_differently_are_told(warnings: list[str]) -> None:
    keep_causal_masks(torch.nn.ModuleList(map(make_mistral, (None, 4))), [])()
    assert len(warnings) == 1
    assert "MistralModel chooses the function that makes its causal mask" in warnings[0]


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
