"""The hand-off through the real `oneshot`, under every pipeline and kind of target."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import naive, runs, tiny
from llmcompressor.core import reset_session
from transformers import PreTrainedModel

from absorb_plugin.blocks import find_blocks

pytestmark = pytest.mark.contract
BUDGET = 0.5


@pytest.fixture(autouse=True)
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest; test_report has figures."""
    monkeypatch.setattr("absorb_plugin.report.figure.draw", lambda profile: b"")


def targets_of(directory: Path) -> dict[str, float]:
    """Full name of a Linear -> target, from the profile."""
    profile = json.loads((directory / "profile.json").read_text())
    return {
        f"{block['name']}.{name}": linear["sparsity"]
        for block in profile["blocks"]
        for name, linear in block["linears"].items()
    }


def check(
    model: PreTrainedModel,
    before: dict[str, torch.Tensor],
    targets: dict[str, float],
    kind: str,
) -> None:
    """Realised sparsity as targeted, budget met, everything else bit-identical."""
    sizes = {name: before[f"{name}.weight"].numel() for name in targets}
    total = sum(targets[name] * size for name, size in sizes.items())
    assert total / sum(sizes.values()) == pytest.approx(BUDGET, abs=1e-6)
    after = tiny.snapshot(model)
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in targets:
            assert torch.equal(after[name], tensor), name
    for name, target in targets.items():
        zeros = after[f"{name}.weight"] == 0
        if kind == "wanda":  # exact in every row
            assert set(zeros.sum(dim=1).tolist()) == {int(zeros.shape[1] * target)}
            kept = ~zeros
            original = before[f"{name}.weight"][kept]
            assert torch.equal(after[f"{name}.weight"][kept], original)
        else:  # over the whole weight, and one more
            expected = zeros.numel() * target
            assert expected - 1 <= zeros.sum() <= expected + 2


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_every_pipeline_and_pruner(tmp_path: Path, kind: str, pipeline: str) -> None:
    model = tiny.make_model("llama")
    before = tiny.snapshot(model)
    ours = runs.absorption(report_dir=tmp_path)
    pruner = runs.pruner(kind)
    runs.run(model, [ours, pruner], tmp_path, pipeline=pipeline)
    targets = targets_of(tmp_path)
    assert targets.keys() == find_blocks(model).linears().keys()
    assert len({round(target, 6) for target in targets.values()}) > 3
    check(model, before, targets, kind)
    assert pruner.sparsity == [*targets.values(), 0.0]  # module order, the head last


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "opt", "qwen3_moe"])
def test_other_architectures(tmp_path: Path, architecture: str) -> None:
    model = tiny.make_model(architecture)
    before = tiny.snapshot(model)
    recipe = [runs.absorption(report_dir=tmp_path), runs.pruner()]
    runs.run(model, recipe, tmp_path, pipeline="sequential")
    targets = targets_of(tmp_path)
    assert len(targets) == len(find_blocks(model).linears())
    check(model, before, targets, "wanda")


LINEARS = 7
TARGETS: list[tuple[str, Any, int]] = [
    ("block class", ["LlamaDecoderLayer"], 2 * LINEARS),
    ("block regex", [r"re:.*layers\.\d+$"], 2 * LINEARS),
    ("linears", ["Linear"], 2 * LINEARS),
    ("bare string", "LlamaDecoderLayer", 2 * LINEARS),
    ("bare regex", r"re:.*layers\.\d+$", 2 * LINEARS),
    ("linear regex", [r"re:.*mlp\..*_proj$"], 2 * 3),
    (
        "names out of order",
        ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"],
        2,
    ),
]


@pytest.mark.parametrize(
    "kind, ignore", [("wanda", ["re:.*lm_head$"]), ("sparsegpt", ["lm_head"])]
)
@pytest.mark.parametrize(
    "targets, count", [case[1:] for case in TARGETS], ids=[case[0] for case in TARGETS]
)
def test_every_kind_of_target(
    tmp_path: Path,
    warnings: list[str],
    kind: str,
    ignore: list[str],
    targets: Any,
    count: int,
) -> None:
    model = tiny.small()
    before = tiny.snapshot(model)
    pruner = runs.pruner(kind, targets=targets, ignore=ignore)
    ours = runs.absorption(report_dir=tmp_path)
    runs.run(model, [ours, pruner], tmp_path)
    found = targets_of(tmp_path)
    assert len(found) == count
    check(model, before, found, kind)
    assert isinstance(pruner.sparsity, list)
    told = [message for message in warnings if "bare string" in message]
    assert len(told) == isinstance(targets, str)


def test_experts_that_no_token_reached(tmp_path: Path) -> None:
    model = tiny.make_model("qwen3_moe", num_experts=8)
    recipe = [runs.absorption(strength="auto", report_dir=tmp_path), runs.pruner()]
    runs.run(
        model,
        recipe,
        tmp_path,
        dataset=tiny.make_dataset(2, tokens=3),
        samples=2,
        moe_calibrate_all_experts=False,
    )
    targets, sizes = targets_of(tmp_path), find_blocks(model).linears()
    total = sum(targets[name] * sizes[name].weight.numel() for name in targets)
    weights = sum(linear.weight.numel() for linear in sizes.values())
    assert total / weights == pytest.approx(BUDGET, abs=1e-6)


def test_without_ignore_the_head_stays_dense(tmp_path: Path) -> None:
    for kind in runs.PRUNERS:
        model = tiny.small()
        before = tiny.snapshot(model)
        ours = runs.absorption(report_dir=tmp_path)
        runs.run(model, [ours, runs.pruner(kind, ignore=[])], tmp_path)
        check(model, before, targets_of(tmp_path), kind)
        reset_session()


@pytest.mark.parametrize(
    "targets", [["Linear", "lm_head"], ["LlamaDecoderLayer", "re:lm_head$"]], ids=str
)
def test_the_head_is_pruned_if_named(tmp_path: Path, targets: list[str]) -> None:
    model = tiny.small()
    ours = runs.absorption(report_dir=tmp_path)
    runs.run(model, [ours, runs.pruner(targets=targets, ignore=[])], tmp_path)
    zeros = (model.lm_head.weight == 0).sum(dim=1)
    assert set(zeros.tolist()) == {int(model.config.hidden_size * BUDGET)}


@pytest.mark.parametrize(
    "kind, theirs, ours",
    [
        ("wanda", ["re:.*lm_head", "re:.*down_proj$"], []),
        ("sparsegpt", ["re:.*lm_head", "re:.*down_proj$"], []),
        ("wanda", ["re:.*lm_head"], ["re:.*down_proj$"]),
        ("sparsegpt", ["lm_head"], ["re:.*down_proj$"]),
        ("wanda", ["lm_head"], "re:.*down_proj"),
        (
            "sparsegpt",
            ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
            [],
        ),
    ],
)
@pytest.mark.parametrize("targets", [["Linear"], ["LlamaDecoderLayer"]], ids=str)
def test_ignored_linears_stay_bit_for_bit(
    tmp_path: Path, kind: str, theirs: list[str], ours: Any, targets: list[str]
) -> None:
    model = tiny.small()
    before = tiny.snapshot(model)
    modifier = runs.absorption(report_dir=tmp_path, ignore=ours)
    pruner = runs.pruner(kind, targets=targets, ignore=theirs)
    runs.run(model, [modifier, pruner], tmp_path)
    found = targets_of(tmp_path)
    assert len(found) == 2 * (LINEARS - 1)
    assert not any("down_proj" in name for name in found)
    check(model, before, found, kind)


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("strength", [0, 0.2])
def test_granularity_linear_splits_block_targets(
    tmp_path: Path, kind: str, strength: float
) -> None:
    model = tiny.small()
    before = tiny.snapshot(model)
    ours = runs.absorption(granularity="linear", strength=strength, report_dir=tmp_path)
    pruner = runs.pruner(kind, targets=["LlamaDecoderLayer"])
    runs.run(model, [ours, pruner], tmp_path)
    found = targets_of(tmp_path)
    assert len(set(found.values())) > 4
    assert pruner.targets == list(found)
    check(model, before, found, kind)


def sample_passes(tmp_path: Path, recipe: list, pipeline: str) -> list[int]:
    """How many samples run through each block during `oneshot`."""
    model = tiny.small()
    blocks = find_blocks(model).blocks
    seen = [0] * len(blocks)

    def count(index: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
            seen[index] += len(output)

        return hook

    for index, block in enumerate(blocks):
        block.module.mlp.down_proj.register_forward_hook(count(index))
    runs.run(model, recipe, tmp_path, pipeline=pipeline)
    reset_session()
    return seen


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_no_calibration_pass_of_the_toolkit_for_us(
    tmp_path: Path, pipeline: str
) -> None:
    samples, blocks = 6, 2
    alone = np.array(sample_passes(tmp_path, [runs.pruner()], pipeline))
    own_passes = {
        # allocator, strength, signal: per block, in units of the samples
        ("uniform", 0, "gradient"): [0, 0],
        ("owl", 0, "gradient"): [1, 1],
        # the graph is kept, and no block runs again
        ("owl", 0.2, "gradient"): [1 + 1, 1 + 1],
        ("owl", 0.2, "response"): [1 + 2, 1 + 3],
        # the noise after block 0 and the rounding floor pass block 1
        ("uniform", 0.2, "noise"): [1, 1 + 2],
        ("owl", 0.2, "noise"): [1 + 1, 1 + 1 + 2],
    }
    for (allocator, strength, signal), expected in own_passes.items():
        ours = runs.absorption(
            allocator=allocator, strength=strength, signal=signal, level="block"
        )
        with_us = sample_passes(tmp_path, [ours, runs.pruner()], pipeline)
        # the check of the model before all else: of one sample three passes, then one
        check = 0 if strength == 0 else 4
        extra = (with_us - alone - check) / samples
        assert extra.tolist() == expected, (allocator, strength, signal)
    assert len(alone) == blocks


@pytest.mark.parametrize("signal", ["gradient", "response", "noise"])
def test_same_seed_same_weights(tmp_path: Path, signal: str) -> None:
    results = []
    for _ in range(2):
        model = tiny.small()
        ours = runs.absorption(signal=signal, strength="auto", rounds=2)
        pruner = runs.pruner("sparsegpt")
        # a shuffling loader, as is the default
        runs.run(model, [ours, pruner], tmp_path, samples=6, batch_size=2)
        results.append((tiny.snapshot(model), pruner.sparsity))
        reset_session()
    tiny.assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_the_pruner_sees_the_samples_that_it_would_see_without_us(
    tmp_path: Path,
) -> None:
    """Uniform at strength 0 is the same as no absorption at all."""
    results = []
    for ours in ([], [runs.absorption(allocator="uniform", strength=0)]):
        model = tiny.small()
        dataset = tiny.make_dataset(12)
        runs.run(model, [*ours, runs.pruner()], tmp_path, dataset=dataset, samples=6)
        results.append(tiny.snapshot(model))
        reset_session()
    tiny.assert_same(results[0], results[1])


def test_owl_at_strength_zero_hands_over_its_ratios(tmp_path: Path) -> None:
    """The base allocation equals one worked out from plain hooks."""
    model = tiny.make_model("llama")
    blocks, dataset = find_blocks(model), tiny.make_dataset(6)
    rows = {name: torch.tensor(dataset[name][:]) for name in dataset.column_names}
    sums = naive.square_sums(model, blocks, rows)
    outliers = []
    for block in blocks.blocks:
        scores = torch.cat(
            [
                (linear.weight.abs() * sums[block.full_name(name)].sqrt()).flatten()
                for name, linear in block.linears.items()
            ]
        )
        outliers.append(float((scores > 2 * scores.mean()).double().mean()))
    u = np.array(outliers) - min(outliers)
    u *= 2 * 0.08 / u.max()
    expected = BUDGET - (u - u.mean())  # blocks are equally large
    pruner = runs.pruner(targets=["LlamaDecoderLayer"])
    ours = runs.absorption(strength=0, allocator_args={"m": 2.0})
    runs.run(model, [ours, pruner], tmp_path, dataset=dataset)
    np.testing.assert_allclose(pruner.sparsity, expected, atol=1e-6)
