"""Profiles as a run writes them, with round numbers."""

import math
from typing import Any

KINDS = ("self_attn.q_proj", "mlp.up_proj")


def make_profile(blocks: int = 12, **changes: Any) -> dict[str, Any]:
    """Content of profile.json, at level "block"."""
    profile = {
        "schema_version": 2,
        "run": "0123abcd",
        "model": {
            "class": "LlamaForCausalLM",
            "name_or_path": "org/tiny-model",
            "dtype": "float32",
        },
        "pruner": "WandaPruningModifier",
        "level": "block",
        "calibration": {"samples": 6, "tokens": 4096, "longest": 512},
        "samples": [
            {"use": "statistics", "samples": 3, "tokens": 1536},
            {"use": "confirm", "samples": 16, "tokens": 8192},
        ],
        "recipe": "prune_stage:\n  prune_modifiers:\n    WandaPruningModifier: {}\n",
        "command": "absorb prune org/tiny-model --recipe recipe.yaml --out pruned",
        "settings": {"allocator": "owl", "strength": "auto", "max_sparsity": 0.95},
        "noise": {"magnitude": 0.01, "floor": [1e-4] * blocks},
        "search": make_search(blocks),
        "confirmed": None,
        "quality": None,
        "budget": 0.5,
        "achieved": 0.5,
        "realised": 0.499,
        "zeros_lost": 0.0,
        "other_weights": {},
        "unseen_linears": [],
        "blocks": [make_block(index, blocks) for index in range(blocks)],
        "versions": {"torch": "2.13.0", "absorb-plugin": "0.1.0"},
    }
    return profile | changes


def make_block(index: int, blocks: int) -> dict[str, Any]:
    sparsity = round(0.5 + 0.1 * math.sin(2.3 * index), 4)
    drift = [None] * index + [0.01 * 1.1**k for k in range(blocks - index)]
    return {
        "name": f"model.layers.{index}",
        "parameters": 1000 + 37 * (index * 5 % blocks),
        "base_metric": 2.0**index,
        "base_sparsity": 0.5,
        "drift": drift,
        "realignment": [None if d is None else 1.0 for d in drift],
        "ratio": round(1.2 - 0.05 * index, 4),
        "ratio_error": None if index == 0 else 0.01,
        "direction": -0.25 + 0.05 * index,
        "sparsity": sparsity,
        "realised_sparsity": sparsity - 0.001,
        "linears": {kind: make_linear(sparsity) for kind in KINDS},
    }


def make_linear(sparsity: float, parameters: int = 500) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "base_sparsity": 0.5,
        "sparsity": sparsity,
        "realised_sparsity": sparsity - 0.001,
    }


def make_search(blocks: int = 12, **changes: Any) -> dict[str, Any]:
    return {
        "start": "base",
        "base_loss": 4.5,
        "uniform_loss": 4.6,
        "loss": 4.25,
        "rounds": [
            {
                "direction": [0.0] * blocks,
                "strengths": [-0.05, 0.0, 0.1],
                "losses": [4.6, 4.5, 4.25],
                "chosen": 0.1,
            }
        ],
        "steps": [],
        "judged": [{"steps": 0, "loss": 4.5}],
        "taken": 0,
    } | changes


def make_descent(**changes: Any) -> dict[str, Any]:
    """A search that takes three of four steps."""
    losses, judged = (4.7, 4.4, 4.3, 4.2), {0: 4.5, 1: 4.4, 3: 4.25, 4: 4.3}
    steps = [{"loss": x, "length": 0.05, "largest": 0.2} for x in losses]
    points = [{"steps": count, "loss": loss} for count, loss in judged.items()]
    return make_search(rounds=[], steps=steps, judged=points, taken=3) | changes


def make_confirmed(chosen: str = "searched", **losses: float | None) -> dict[str, Any]:
    """By default the outcome of the search is taken, and is 0.21 nats better."""
    losses = {"base": 4.46, "uniform": 4.5, "searched": 4.25} | losses
    return {
        "judge": "sparsegpt",
        "losses": losses,
        "chosen": chosen,
        "gain": (losses["base"] or 0.0) - (losses[chosen] or 0.0),
        "standard_error": 0.03,
        "anew": False,
        "chose_nothing": True,
    }


def make_quality(**changes: Any) -> dict[str, Any]:
    points = zip((0.3, 0.5, 0.6), (0.01, 0.08, 0.19), (0.001, 0.008, 0.02))
    return {
        "max_loss_increase": 0.1,
        "curve": [
            {
                "sparsity": s,
                "loss_increase": loss,
                "standard_error": error,
                "allocation": "searched",
            }
            for s, loss, error in points
        ],
        "found": 0.5,
        "quantization": None,
    } | changes


# kinds of Linears of a Llama block
LLAMA = tuple(f"self_attn.{part}_proj" for part in "qkvo")
LLAMA += tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))


def make_linear_profile(
    blocks: int = 12, kinds: tuple[str, ...] = LLAMA, **changes: Any
) -> dict[str, Any]:
    """As `make_profile`, but with a target for every Linear."""
    profile = make_profile(blocks, level="linear", **changes)
    for index, block in enumerate(profile["blocks"]):
        block["linears"] = {
            kind: make_linear(round(0.5 + 0.1 * math.sin(index + 2 * row), 4))
            for row, kind in enumerate(kinds)
        }
    return profile
