"""Whether llm-compressor's pipelines run a model as the model runs by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runs, tiny

from absorb_plugin.blocks import find_blocks
from absorb_plugin.pruners.traced import warn_of_lost_mask

LOST = ["mistral", "phi3", "mixtral", "qwen3_moe"]
KEPT = ["llama", "qwen3", "gemma3", "opt"]


@pytest.mark.contract
@pytest.mark.parametrize("name", [*LOST, *KEPT])
def test_causal_mask_under_calibration(
    name: str, warnings: list[str], tmp_path: Path
) -> None:
    """
    If one of LOST fails, llm-compressor has learnt to trace it: say so with a version
    in `warn_of_lost_mask`.
    """
    model, seen = tiny.make_model(name), []
    block = find_blocks(model).modules[0]

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        seen.append(found.detach().clone())

    block.register_forward_hook(note)
    samples = tiny.make_dataset(1)
    row = {k: torch.tensor([samples[0][k]]) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        model(**row)
    runs.run(
        model,
        [runs.absorption(allocator="uniform", strength=0), runs.pruner(sparsity=0.1)],
        tmp_path,
        dataset=samples,
        samples=1,
    )
    alone, calibrated = seen[0], seen[1]
    assert torch.allclose(alone, calibrated, atol=1e-4) == (name in KEPT)
    told = [message for message in warnings if "without a causal mask" in message]
    assert len(told) == (name in LOST)


def test_a_class_without_source(warnings: list[str]) -> None:
    kind: dict[str, Any] = {}
    exec("import torch\nclass Odd(torch.nn.Module):\n    pass", kind)
    warn_of_lost_mask(kind["Odd"](), [])
    assert not warnings
