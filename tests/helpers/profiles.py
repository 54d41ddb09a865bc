"""profile.json with round numbers."""

import math
from typing import Any

__all__ = ["NAMES", "make_profile"]

NAMES = ["self_attn.q_proj", "mlp.up_proj"]


def make_profile(blocks: int = 12, **changes: Any) -> dict[str, Any]:
    """As `Report.profile` gives it, with round numbers."""

    def block(index: int) -> dict[str, Any]:
        sparsity = round(0.5 + 0.1 * math.sin(2.3 * index), 4)
        drift = [None] * index + [0.01 * 1.1**k for k in range(blocks - index)]
        return {
            "name": f"model.layers.{index}",
            "parameters": 1000 + 37 * (index * 5 % blocks),
            "metric": 2.0**index,
            "base_sparsity": 0.5,
            "drift": drift,
            "realignment": [None if d is None else 1.0 for d in drift],
            "ratio": round(1.2 - 0.05 * index, 4),
            "ratio_error": None if index == 0 else 0.01,
            "direction": -0.25 + 0.05 * index,
            "sparsity": sparsity,
            "realised_sparsity": sparsity - 0.001,
            "linears": {
                name: {
                    "parameters": 500,
                    "sparsity": sparsity,
                    "realised_sparsity": sparsity - 0.001,
                }
                for name in NAMES
            },
        }

    strengths = [-0.05, 0.0, 0.1]
    profile = {
        "schema_version": 1,
        "model": {
            "class": "LlamaForCausalLM",
            "name_or_path": "org/tiny-model",
            "dtype": "float32",
        },
        "pruner": "WandaPruningModifier",
        "calibration": {"samples": 6, "tokens": 4096, "longest": 512},
        "recipe": "prune_stage:\n  prune_modifiers:\n    WandaPruningModifier: {}\n",
        "command": "absorb prune org/tiny-model --recipe recipe.yaml --out pruned",
        "settings": {"allocator": "owl", "strength": "auto", "max_sparsity": 0.95},
        "noise": {"magnitude": 0.01, "floor": [1e-4] * blocks},
        "search": {
            "start": "base",
            "base_loss": 4.5,
            "uniform_loss": 4.6,
            "loss": 4.25,
            "rounds": [
                {
                    "direction": [0.0] * blocks,
                    "strengths": strengths,
                    "losses": [4.6, 4.5, 4.25],
                    "chosen": 0.1,
                }
            ],
        },
        "budget": 0.5,
        "achieved": 0.5,
        "realised": 0.499,
        "blocks": [block(index) for index in range(blocks)],
        "versions": {"torch": "2.13.0", "absorb-plugin": "0.1.0"},
    }
    return profile | changes
