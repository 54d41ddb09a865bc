"""
Random recipes on a tiny model, through llm-compressor's own session and pipelines:
each ends with the budget kept or with one of our errors, and never with damage.

`make fuzz` runs 2,000 examples, `make test` 100. What was found is kept in FOUND.
"""

import copy
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runs, tiny
from helpers.remote import Lookalike
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from llmcompressor.args import DatasetArguments
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.pipelines import CalibrationPipeline
from pydantic import ValidationError
from transformers import PreTrainedModel

import absorb_plugin
from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.blocks import find_blocks
from absorb_plugin.groups import LEVELS
from absorb_plugin.hookspecs import hookimpl
from absorb_plugin.plugins import PluginError, allocators, manager
from absorb_plugin.settings import EFFORTS
from absorb_plugin.signals import SIGNALS

NIGHTLY = "ABSORB_NIGHTLY" in os.environ
PACKAGE = str(Path(absorb_plugin.__file__).parent)
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 24,
}
MODEL = tiny.make_model("llama", **SHAPE)

WRAPPERS = {"none": lambda model: model, "peft": Lookalike}
CONTEXTS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}

PATTERNS = [
    "Linear", "LlamaDecoderLayer", "LlamaMLP", "LlamaAttention", "LlamaModel",
    "LlamaForCausalLM", "Embedding", "ModuleList", "lm_head", "model.layers.0",
    "model.layers.1.mlp", "model.layers.1.mlp.down_proj",
    "model.layers.0.self_attn.q_proj", r"re:.*layers\.\d+$", "re:.*mlp.*",
    "re:.*_proj$", "re:.*", "re:lm_head", "re:.*lm_head$", "re:model.layers.0.*", "re:",
    "re:(", "", "nonsense", "LINEAR",
]  # fmt: skip
NAMES = {"calibration", "recipe"} | set(AbsorptionAllocationModifier.model_fields)
NAMES |= set(WandaPruningModifier.model_fields)
NAMES |= {name for x in allocators().values() for name in x.allocator.model_fields}
NAMES |= {name for signal in SIGNALS.values() for name in signal.model_fields}


@dataclass
class Case:
    """
    :param ours: fields of AbsorptionAllocationModifier
    :param pruners: of each pruning modifier after it: kind and fields
    :param rows: tokens of each calibration sample, the rest padding
    :param side: where the padding is
    :param pipeline: llm-compressor's
    :param wrapper: around the model, of WRAPPERS
    :param context: around the whole run, of CONTEXTS
    :param ids: dtype of token ids and masks
    :param zeros: share of the weights that are zero before
    """

    ours: dict[str, Any] = field(default_factory=dict)
    pruners: list[tuple[str, dict[str, Any]]] = field(
        default_factory=lambda: [("wanda", {"sparsity": 0.5})]
    )
    rows: list[int] = field(default_factory=lambda: [5, 5, 5])
    side: str = "right"
    pipeline: str = "basic"
    wrapper: str = "none"
    context: str = "none"
    ids: torch.dtype = torch.int64
    zeros: float = 0.0


def rarely(usual: st.SearchStrategy, odd: st.SearchStrategy) -> st.SearchStrategy:
    return st.integers(0, 19).flatmap(lambda x: odd if x == 7 else usual)


def patterns() -> st.SearchStrategy:
    one = st.sampled_from(PATTERNS)
    return one | st.lists(one, max_size=3) | st.text(max_size=5)


NUMBERS = st.floats(allow_nan=True) | st.integers(-3, 3) | st.none() | st.text()
ARGUMENTS = st.dictionaries(
    st.sampled_from(["m", "lmbda", "epsilon", "variant", "alpha", "beta", "odd"]),
    st.floats(0, 1) | st.sampled_from([-1, 3.0, 1e9, "mid", None]),
    max_size=1,
)
# One argument, of this signal or of another.
SIGNAL_ARGS = st.one_of(
    *(
        st.fixed_dictionaries({name: rarely(usual, odd)})
        for name, usual, odd in (
            ("step", st.floats(1e-3, 0.99), NUMBERS | st.floats(1e-300, 1)),
            ("magnitude", st.floats(1e-6, 10), NUMBERS | st.floats(0, 1e300)),
            ("samples", st.integers(1, 9), NUMBERS),
            ("samples_limit", st.integers(1, 9), NUMBERS),
            ("dtype", st.sampled_from(["model", "float32"]), st.text(max_size=3)),
            ("seed", st.integers(0, 2**63 - 1), NUMBERS | st.just(2**63)),
            ("sink_tokens", st.sampled_from(["perturb", "spare"]), st.text(max_size=3)),
            ("odd", NUMBERS, NUMBERS),
        )
    )
)
# what limits may name, bounds that most budgets fit between, and anything at all
LIMITED = ["model.layers.0.mlp.up_proj", "re:.*down_proj$", "re:.*layers\\.1"]
WIDE_BOUNDS = st.tuples(st.floats(0, 0.2), st.floats(0.9, 1))
LIMITS = st.dictionaries(
    st.sampled_from(PATTERNS), st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=2
)
OURS = {
    "allocator": rarely(st.sampled_from(sorted(allocators())), st.text(max_size=5)),
    "allocator_args": rarely(st.just({}), ARGUMENTS) | ARGUMENTS,
    "granularity": rarely(st.sampled_from(["block", "linear"]), st.text(max_size=3)),
    "signal": rarely(st.sampled_from(["auto", *SIGNALS]), st.text(max_size=3)),
    "signal_args": rarely(st.just({}), SIGNAL_ARGS),
    "level": rarely(st.sampled_from(["auto", *LEVELS]), st.text(max_size=3)),
    "effort": rarely(st.sampled_from(list(EFFORTS)), st.text(max_size=3)),
    "rounds": rarely(st.integers(1, 3), NUMBERS),
    "descents": rarely(st.none() | st.integers(1, 2), NUMBERS),
    "strength": rarely(
        st.just("auto") | st.just(0) | st.floats(-1, 1), NUMBERS | st.just(2)
    ),
    "statistics_samples": rarely(st.integers(1, 9), NUMBERS),
    "signal_samples": rarely(st.integers(1, 9), NUMBERS),
    "search_samples": rarely(st.integers(1, 9), NUMBERS),
    "confirm_samples": rarely(st.integers(0, 9), NUMBERS),
    "probe_tokens": rarely(st.integers(2, 9), NUMBERS),
    "max_sparsity": rarely(st.floats(0.6, 0.999), NUMBERS | st.floats(0, 1)),
    "probe_memory": rarely(st.integers(1, 2**40) | st.just("auto"), NUMBERS),
    "limits": rarely(
        st.dictionaries(st.sampled_from(LIMITED), WIDE_BOUNDS, max_size=2), LIMITS
    ),
    "max_loss_increase": rarely(st.none() | st.floats(0.01, 9), NUMBERS),
    "reduce_pruner_statistics": rarely(st.booleans(), NUMBERS),
    "ignore": patterns(),
    "unknown": st.just(1),
}
USUAL = [name for name in OURS if name not in ("ignore", "unknown")]


def test_every_field_is_drawn() -> None:
    own = set(AbsorptionAllocationModifier.model_fields) - set(Modifier.model_fields)
    # directories have tests of their own
    assert set(OURS) - {"unknown"} == own - {
        "report_dir", "profile_cache", "requires_calibration_data"
    }  # fmt: skip


@st.composite
def ours(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(USUAL), max_size=6, unique=True))
    names += draw(rarely(st.just([]), st.just(["unknown"])))
    names += draw(st.sampled_from([[], [], ["ignore"]]))
    fields = {name: draw(OURS[name]) for name in names}
    if fields.get("signal") in SIGNALS and draw(st.booleans()):
        own = SIGNALS[fields["signal"]].model_fields.keys()
        fields["signal_args"] = draw(SIGNAL_ARGS.filter(lambda x: x.keys() <= own))
    return fields


@st.composite
def pruner(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    odd = NUMBERS | st.lists(st.floats(0, 1), max_size=3) | st.just(True)
    fields = {"sparsity": draw(rarely(st.floats(0, 0.9), odd))}
    usual = st.sampled_from([["Linear"], ["LlamaDecoderLayer"]])
    if draw(st.booleans()):
        fields["targets"] = draw(usual | patterns())
    if draw(st.booleans()):
        fields["ignore"] = draw(st.just(["re:.*lm_head"]) | patterns())
    structure = draw(rarely(st.just("0:0"), st.sampled_from(["2:4", "4:8", "x", ""])))
    if structure != "0:0":
        fields["mask_structure"] = structure
    if draw(st.integers(0, 29)) == 7:
        fields |= {"sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.08}
    kind = draw(st.sampled_from(["wanda", "sparsegpt"]))
    if kind == "sparsegpt" and draw(st.booleans()):
        fields["preserve_sparsity_mask"] = True
    return kind, fields


# the other pipelines trace the model at every run
PIPELINES = ["basic"] * 12 + ["independent", "sequential"]
CASES = st.builds(
    Case,
    ours(),
    rarely(st.lists(pruner(), min_size=1, max_size=1), st.lists(pruner(), max_size=2)),
    rarely(
        st.lists(st.integers(3, 6), min_size=2, max_size=4),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    st.sampled_from(["left", "right"]),
    st.sampled_from(PIPELINES),
    st.sampled_from(["none"] * 5 + ["peft"]),
    st.sampled_from(["none"] * 3 + list(CONTEXTS)),
    st.sampled_from([torch.int64, torch.int64, torch.int32]),
    st.sampled_from([0.0, 0.0, 0.0, 0.2, 0.5]),
)


def batches(case: Case) -> list[dict[str, torch.Tensor]]:
    if not case.rows:
        return []
    tokens = max(1, *case.rows)
    generator = torch.Generator().manual_seed(0)
    shape = (len(case.rows), tokens)
    ids = torch.randint(3, SHAPE["vocab_size"], shape, generator=generator)
    mask = torch.ones_like(ids)
    for row, kept in enumerate(case.rows):
        unused = slice(kept, None) if case.side == "right" else slice(0, tokens - kept)
        ids[row, unused], mask[row, unused] = 0, 0
    return [{"input_ids": ids.to(case.ids), "attention_mask": mask.to(case.ids)}]


def make_model(case: Case) -> PreTrainedModel:
    model = copy.deepcopy(MODEL)
    generator = torch.Generator().manual_seed(0)
    for linear in find_blocks(model).linears().values():
        drop = torch.rand(linear.weight.shape, generator=generator) < case.zeros
        linear.weight.data[drop] = 0
    return WRAPPERS[case.wrapper](model)


def apply(model: PreTrainedModel, recipe: list[Modifier], case: Case) -> None:
    """What `oneshot` does with model, recipe and data, and no more."""
    session, data = active_session(), batches(case)
    session.reset()
    session.initialize(model=model, start=-1, recipe=recipe, calib_data=data)
    pipeline = CalibrationPipeline.from_modifiers(recipe, user=case.pipeline)
    pipeline(model, data, DatasetArguments())
    session.finalize()


class Observer:
    def __init__(self) -> None:
        self.profiles: list[dict[str, Any]] = []

    @hookimpl
    def allocation_finished(self, profile: dict[str, Any]) -> None:
        self.profiles.append(profile)


@contextmanager
def observed() -> Iterator[Observer]:
    observer = Observer()
    manager().register(observer)
    try:
        yield observer
    finally:
        manager().unregister(observer)


def documented(error: Exception) -> bool:
    """Raised by us, of a kind that we document, and it names what to change."""
    if isinstance(error, ValidationError):
        return True
    if not isinstance(error, ValueError | PluginError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return last.startswith(PACKAGE) and bool(
        set(re.findall(r"\w+", str(error))) & NAMES
    )


def check(case: Case) -> None:
    model = make_model(case)
    before = tiny.snapshot(model)
    try:
        recipe = [
            AbsorptionAllocationModifier(**case.ours),
            *(runs.PRUNERS[kind](**fields) for kind, fields in case.pruners),
        ]
    except ValidationError:
        return
    with observed() as observer:
        try:
            with CONTEXTS[case.context]():
                apply(model, recipe, case)
        except Exception as error:
            if not documented(error):
                raise
            tiny.assert_untouched(model, before)
            return
    assert len(observer.profiles) == len(case.pruners)
    for modifier, profile, (_, fields) in zip(
        recipe[1:], observer.profiles, case.pruners, strict=True
    ):
        budget = fields["sparsity"]
        if recipe[0].max_loss_increase is not None:  # the budget is the largest then
            assert profile["budget"] <= budget
            budget = profile["budget"]
        assert profile["achieved"] == pytest.approx(budget, abs=1e-6)
        assert isinstance(modifier.sparsity, list)
        cap = recipe[0].max_sparsity + 1e-9
        for name, s in targets_of(profile).items():
            own = share_of_zeros(before[f"{name}.weight"])  # may be above the cap
            assert 0 <= s <= max(cap, own + 1e-6)
    for name, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, name
    if len(case.pruners) == 1:
        check_realised(case, model, before, observer.profiles[0])


def share_of_zeros(tensor: torch.Tensor) -> float:
    return int((tensor == 0).sum()) / tensor.numel()


def targets_of(profile: dict[str, Any]) -> dict[str, float]:
    return {
        f"{block['name']}.{name}": linear["sparsity"]
        for block in profile["blocks"]
        for name, linear in block["linears"].items()
    }


def check_realised(
    case: Case,
    model: PreTrainedModel,
    before: dict[str, torch.Tensor],
    profile: dict[str, Any],
) -> None:
    """Wanda floors every row, SparseGPT a whole weight; all else is bit-identical."""
    ((kind, fields),) = case.pruners
    targets, after = targets_of(profile), tiny.snapshot(model)
    for name, tensor in before.items():
        zeros = after[name] == 0
        target = targets.get(name.removesuffix(".weight"))
        if target is None:
            if name.endswith("lm_head.weight") and zeros.any():  # targeted by its name
                target = fields["sparsity"]
            else:
                assert torch.equal(after[name], tensor), name
                continue
        if kind == "wanda":
            rows = (tensor == 0).sum(dim=1).clamp(min=int(zeros.shape[1] * target))
            assert torch.equal(zeros.sum(dim=1), rows), (name, target)
        else:
            expected = zeros.numel() * max(target, share_of_zeros(tensor))
            assert expected - 1 <= zeros.sum() <= expected + 2, (name, target)


# Recipes that went wrong before they were looked at, by this test or by hand.
FOUND: dict[str, Case] = {
    # an `re.error` of compressed-tensors, which names no field
    "targets that are no regular expression": Case(
        pruners=[("wanda", {"sparsity": 0.5, "targets": ["re:("]})]
    ),
    "ignore that is no regular expression": Case(ours={"ignore": ["re:("]}),
    # "ratios must be positive", of which no recipe speaks
    "noise lost in rounding": Case(
        ours={"signal": "noise", "strength": 0.1, "signal_args": {"magnitude": 1e-30}}
    ),
    "noise that overflows": Case(
        ours={"signal": "noise", "strength": 0.1, "signal_args": {"magnitude": 1e38}}
    ),
    # measured for a while, and only then "no token to predict"
    "samples of one token": Case(rows=[1, 1], ours={"allocator": "uniform"}),
    "padding alone": Case(rows=[0, 0, 0], ours={"strength": 0}),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    check(FOUND[name])


@settings(
    max_examples=2000 if NIGHTLY else 100,
    derandomize=not NIGHTLY,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(CASES)
@example(Case())
@example(Case(pipeline="independent"))
def test_random_recipes(case: Case) -> None:
    check(case)
