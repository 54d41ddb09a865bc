"""What the modifier refuses, and that it does so before the model runs at all."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runs, tiny
from llmcompressor.modifiers import Modifier
from pydantic import ValidationError
from transformers import PreTrainedModel

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.forward.run import NonFiniteHiddenState

pytestmark = pytest.mark.contract

Recipe = Callable[[], list[Modifier]]


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    """A model that must not run."""
    model = tiny.make_model("llama", num_hidden_layers=2)
    before = tiny.snapshot(model)
    with tiny.counted({"model": model.model}) as passes:
        yield model
    assert passes == {"model": 0}
    tiny.assert_untouched(model, before)


def pruned_by(**fields: Any) -> Recipe:
    return lambda: [runs.absorption(), runs.pruner(**fields)]


def with_ours(**fields: Any) -> Recipe:
    return lambda: [runs.absorption(**fields), runs.pruner()]


class REAPPruningModifier(Modifier):
    """Of this name; llm-compressor 0.12 has none."""

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        return True


REFUSED: dict[str, tuple[Recipe, str]] = {
    "no pruner": (lambda: [runs.absorption()], "no pruning modifier follows"),
    "pruner before us only": (
        lambda: [runs.pruner(), runs.absorption()],
        "no pruning modifier follows",
    ),
    "pruner of a second one of us": (
        lambda: [runs.absorption(), runs.absorption(), runs.pruner()],
        "no pruning modifier follows",
    ),
    "list": (
        pruned_by(sparsity=[0.5] * 2, targets=["LlamaDecoderLayer"]),
        r"WandaPruningModifier has sparsity=\[0\.5, 0\.5\].*one scalar",
    ),
    "profile": (
        pruned_by(sparsity_profile="owl", owl_m=5, owl_lmbda=0.08),
        "sparsity_profile='owl'.*`allocator`",
    ),
    "2:4": (pruned_by(mask_structure="2:4"), "mask_structure='2:4'"),
    "no columns at a time": (
        lambda: [runs.absorption(), runs.pruner("sparsegpt", block_size=0)],
        "SparseGPTModifier has block_size=0",
    ),
    "budget over the cap": (
        lambda: [runs.absorption(max_sparsity=0.4), runs.pruner()],
        r"WandaPruningModifier: sparsity=0\.5 cannot be met with max_sparsity=0\.4",
    ),
    "budget of one": (pruned_by(sparsity=1.0), r"must be in \[0, 1\)"),
    "no such target": (
        pruned_by(targets=["LlamaBlock"]),
        "would prune no Linear inside the decoder blocks.*LlamaDecoderLayer",
    ),
    "all ignored": (
        pruned_by(ignore=["re:.*proj$", "lm_head"]),
        "would prune no Linear inside the decoder blocks",
    ),
    "all ignored by us": (
        with_ours(ignore=["re:.*proj$"]),
        "would prune no Linear inside the decoder blocks",
    ),
    "a target that spans blocks": (
        pruned_by(targets=["LlamaModel"]),
        "spans 2 decoder blocks and can have one sparsity only",
    ),
    "a bound for two pruners": (
        lambda: [
            runs.absorption(max_loss_increase=0.1, strength="auto"),
            runs.pruner(targets=["re:.*self_attn.*_proj$"]),
            runs.pruner(targets=["re:.*mlp.*_proj$"]),
        ],
        "max_loss_increase bounds what one pruning modifier costs.*judged by nobody",
    ),
    "a bound for a pruner of each of us": (
        lambda: [
            runs.absorption(max_loss_increase=0.1, strength="auto"),
            runs.pruner(targets=["re:.*self_attn.*_proj$"]),
            runs.absorption(max_loss_increase=0.1, strength="auto"),
            runs.pruner(targets=["re:.*mlp.*_proj$"]),
        ],
        "max_loss_increase bounds what one pruning modifier costs.*judged by nobody",
    ),
    "a bound and a Linear outside": (
        lambda: [
            runs.absorption(max_loss_increase=0.1, strength="auto"),
            runs.pruner(targets=["re:.*_proj$", "lm_head"], ignore=[]),
        ],
        "max_loss_increase.*lm_head by name.*upper bound, 0.5.*in `ignore`",
    ),
    "experts that go in between": (
        lambda: [REAPPruningModifier(), runs.absorption(), runs.pruner()],
        "REAPPruningModifier takes Linears out.*`oneshot` of its own, before",
    ),
    "experts that go afterwards": (
        lambda: [runs.absorption(), runs.pruner(), REAPPruningModifier()],
        "REAPPruningModifier takes Linears out.*`oneshot` of its own, before",
    ),
    "limits of nothing": (
        with_ours(limits={"re:.*down$": (0.0, 0.5)}),
        "limits: 're:.*down\\$' matches none of the 14 Linears",
    ),
    "unknown allocator": (with_ours(allocator="bowl"), "bowl.*owl"),
    "unknown argument": (with_ours(allocator_args={"mm": 1}), "owl.*mm"),
    "granularity": (
        with_ours(allocator="uniform", granularity="linear"),
        "'uniform' has no granularity 'linear'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_forward(
    model: PreTrainedModel, tmp_path: Path, case: str
) -> None:
    recipe, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        runs.run(model, recipe(), tmp_path)


def test_a_name_in_ignore_that_leaves_nothing_dense(
    tmp_path: Path, warnings: list[str]
) -> None:
    ignore = ["down_proj", "model.layers.0", "re:.*layers.0.mlp.up_proj", "lm_head"]
    model = tiny.make_model("llama", num_hidden_layers=2)
    ours = runs.absorption(strength=0, allocator="uniform", ignore=ignore)
    runs.run(model, [ours, runs.pruner()], tmp_path)
    told = [message for message in warnings if message.startswith("ignore: ")]
    assert ["'down_proj'" in told[0], "'model.layers.0'" in told[1]] == [True, True]
    assert len(told) == 2


def test_no_calibration_data(model: PreTrainedModel, tmp_path: Path) -> None:
    from llmcompressor import oneshot

    model, tokenizer = tiny.with_tokenizer(model, tmp_path)
    with pytest.raises(ValueError, match=r"no calibration data.*oneshot\(dataset="):
        oneshot(model=model, tokenizer=tokenizer, recipe=pruned_by()())


def test_auto_needs_two_samples(model: PreTrainedModel, tmp_path: Path) -> None:
    recipe = with_ours(strength="auto")()
    with pytest.raises(ValueError, match="raise num_calibration_samples"):
        runs.run(model, recipe, tmp_path, samples=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"strenght": 0.1},
        {"strength": "much"},
        {"rounds": 0},
        {"statistics_samples": 0},
        {"confirm_samples": -1},
        {"signal_samples": 0},
        {"search_samples": 0},
        {"probe_tokens": 1},
        {"level": "head"},
        {"effort": "great"},
        {"signal_args": "step=1"},
        {"max_sparsity": 0.0},
        {"max_sparsity": 1.0},
        {"probe_memory": 0},
        {"granularity": "row"},
    ],
    ids=str,
)
def test_fields_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        AbsorptionAllocationModifier(**fields)


def test_single_strings_are_taken_as_lists_and_paths() -> None:
    modifier = AbsorptionAllocationModifier(ignore="lm_head", report_dir=Path("x"))
    assert modifier.ignore == ["lm_head"]
    assert modifier.report_dir == "x"
    assert AbsorptionAllocationModifier().requires_calibration_data is False


def test_non_finite_weights_name_the_block_and_leave_no_hook(tmp_path: Path) -> None:
    model = tiny.make_model("llama", num_hidden_layers=2)
    model.model.layers[1].mlp.up_proj.weight.data[:] = torch.inf
    before = tiny.snapshot(model)
    with pytest.raises(NonFiniteHiddenState, match=r"model\.layers\.1"):
        runs.run(model, pruned_by()(), tmp_path)
    tiny.assert_same(tiny.snapshot(model), before)
    for name, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, name


@pytest.mark.parametrize(
    "fields",
    [{"signal": "gradient"}, {"signal": "response"}, {"strength": "auto"}],
    ids=str,
)
def test_samples_of_one_token_have_no_loss(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = tiny.make_model("llama", num_hidden_layers=2)
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match="no token to predict.*longer samples"):
        dataset = tiny.make_dataset(6, tokens=1)
        runs.run(model, with_ours(**fields)(), tmp_path, dataset=dataset)
    tiny.assert_same(tiny.snapshot(model), before)
