"""Weights of the blocks that are in no Linear stay dense, and the user is told."""

import json
from pathlib import Path

import pytest
import torch
from helpers import runs, tiny

from absorb_plugin.blocks import find_blocks, linear_parameters
from absorb_plugin.evaluation.allocation import set_up
from absorb_plugin.report.warnings import find_warnings
from absorb_plugin.settings import AllocationSettings


class FusedExperts(torch.nn.Module):
    """As JetMoe and Aria hold them: no Linear, which llm-compressor could prune."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight = torch.nn.Parameter(torch.zeros(4, 32, 32))
        self.scale = torch.nn.Parameter(torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.scale * (x @ self.weight[0])


@pytest.mark.parametrize("fused", [False, True])
def test_experts_in_one_tensor(
    fused: bool, warnings: list[str], tmp_path: Path
) -> None:
    model = tiny.make_model("llama")
    if fused:
        for block in model.model.layers:
            block.mlp = FusedExperts(block.mlp)
    found = find_blocks(model)
    linears = sum(map(linear_parameters, found.linears().values()))
    count = len(found) * 4 * 32 * 32
    shares = {"FusedExperts": count / (count + linears)} if fused else {}
    assert found.other_weights() == pytest.approx(shares)
    recipe = [runs.absorption(report_dir=tmp_path / "r"), runs.pruner()]
    runs.run(model, recipe, tmp_path)
    profile = json.loads((tmp_path / "r" / "profile.json").read_text())
    assert profile["other_weights"] == pytest.approx(shares)
    for told in (warnings, find_warnings(profile)):
        named = [one for one in told if "in no Linear (FusedExperts)" in one]
        assert len(named) == fused
    warnings.clear()
    with set_up(model, AllocationSettings()):
        named = [one for one in warnings if "in no Linear (FusedExperts)" in one]
    assert len(named) == fused


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_a_forward_that_fails_is_told_in_words(architecture: str) -> None:
    model = tiny.make_model(architecture)
    model.model.layers[1].mlp.forward = lambda x: x.view(-1, 7, 11)
    with pytest.raises(ValueError, match="its forward fails on one") as caught:
        runs.allocate(model)
    of_experts = "the Linears that llm-compressor made of its experts do not"
    assert (of_experts in str(caught.value)) == (architecture != "llama")
