"""
What llm-compressor does to an expert that no token reached, which our warning and
docs/compatibility.md say: it calls the expert with no rows, and prunes it all the same.
"""

from pathlib import Path

import pytest
import torch
from helpers import runs, tiny

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(
        tiny.linearize_moe is None,
        reason="llm-compressor 0.11 calls no expert that has no token",
    ),
]


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
def test_experts_without_tokens_are_pruned_blindly(tmp_path: Path, kind: str) -> None:
    model = tiny.make_model("mixtral", num_local_experts=16)
    seen = set()
    for block in model.model.layers:
        for index in range(16):
            block.mlp.experts[index].register_forward_pre_hook(
                lambda expert, args: seen.add(expert) if len(args[0]) else None
            )
    pruner = runs.pruner(kind, sparsity=0.5)
    runs.run(
        model,
        [pruner],
        tmp_path,
        dataset=tiny.make_dataset(2, tokens=2),
        samples=2,
        pipeline="basic",
        moe_calibrate_all_experts=False,
    )
    experts = {block.mlp.experts[i] for block in model.model.layers for i in range(16)}
    unseen = experts - seen
    assert unseen and seen
    for expert in unseen:
        zeros = expert.up_proj.weight == 0
        if kind == "wanda":
            expected = torch.zeros_like(zeros)
            expected[:, : zeros.shape[1] // 2] = True
            assert torch.equal(zeros, expected)
        else:
            assert zeros.all()
