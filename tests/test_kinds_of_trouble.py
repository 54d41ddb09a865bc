"""
Models, data and contexts as people have them: each kind works as the plain one does, or
is refused before anything is measured, by a sentence that says what to do.
docs/reliability.md lists the kinds.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import runs, tiny
from helpers.remote import LOGITS, OUTPUTS, WRAPPERS, Wrapped, make_remote
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.data import DataLoader
from transformers import DynamicCache, PreTrainedModel

from absorb_plugin.allocate import allocate
from absorb_plugin.blocks import find_blocks
from absorb_plugin.calibration import read_batches
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.forward.loss import cross_entropy_sums
from absorb_plugin.language_model import language_model
from absorb_plugin.pruners import PRUNERS
from absorb_plugin.pruners.present import ModelZeros
from absorb_plugin.pruners.sparsegpt import SparseGPT
from absorb_plugin.search.budget import Budget

# Which of our computations are run: masks and slopes, the search with the pruner's own
# arithmetic, the noise.
RUNS: dict[str, dict[str, Any]] = {
    "slope": {"signal": "gradient", "strength": 0.2},
    "search": {"signal": "response", "strength": "auto", "rounds": 1},
    "noise": {"signal": "noise", "strength": 0.1},
}


def sparsities(model: nn.Module, batches: Any = None, **fields: Any) -> np.ndarray:
    return runs.allocate(model, batches, **fields).sparsity


# --- whatever wraps the model ----------------------------------------------------


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_measured_as_the_bare_one(
    wrapper: str, attention: str, case: str
) -> None:
    model = tiny.make_model("llama", attn_implementation=attention)
    expected = sparsities(model, **RUNS[case])
    found = sparsities(WRAPPERS[wrapper](model), **RUNS[case])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_of_the_wrapper(wrapper: str) -> None:
    model = WRAPPERS[wrapper](tiny.make_model("llama"))
    modules = dict(model.named_modules())
    for name, linear in find_blocks(model).linears().items():
        assert modules[name] is linear


def test_a_model_that_is_none() -> None:
    with pytest.raises(ValueError, match="Linear is no transformers model.*wraps one"):
        find_blocks(nn.Linear(2, 2))
    both = nn.ModuleList([tiny.make_model("llama"), tiny.make_model("llama")])
    with pytest.raises(ValueError, match=r"several transformers models \(0, 1\)"):
        language_model(both)


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("oddity", ["cache by position", "cache by name"])
def test_a_model_that_always_makes_a_cache(oddity: str, case: str) -> None:
    """Whatever its configuration says: blocks that run again must not read it."""
    expected = sparsities(make_remote(), **RUNS[case])
    found = sparsities(make_remote(oddity=oddity), **RUNS[case])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_that_is_handed_to_every_forward(attention: str) -> None:
    model = tiny.make_model("llama", attn_implementation=attention)
    expected = sparsities(model, **RUNS["search"])
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(
        *args, **{**kwargs, "past_key_values": DynamicCache(), "use_cache": True}
    )
    found = sparsities(model, **RUNS["search"])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_the_load_of_experts_is_not_asked_for(architecture: str, case: str) -> None:
    """`output_router_logits`, as training leaves it: the head alone has none."""
    expected = sparsities(tiny.make_model(architecture), **RUNS[case])
    model = tiny.make_model(architecture)
    model.config.output_router_logits = True
    np.testing.assert_array_equal(sparsities(model, **RUNS[case]), expected)
    assert model.config.output_router_logits is True


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("which", ["model", "blocks", "within", "forward"])
def test_a_compiled_model_is_measured_as_it_was(which: str, case: str) -> None:
    expected = sparsities(tiny.make_model("llama"), **RUNS[case])
    model = tiny.make_model("llama")
    for layer in model.model.layers:
        if which == "blocks":
            layer.compile(backend="eager")
        elif which == "within":
            layer.mlp = torch.compile(layer.mlp, backend="eager")
        elif which == "forward":
            layer.mlp.forward = torch.compile(layer.mlp.forward, backend="eager")
    if which == "model":
        model.compile(backend="eager")
    np.testing.assert_array_equal(sparsities(model, **RUNS[case]), expected)


@pytest.mark.parametrize("case", RUNS)
def test_a_configuration_that_calls_its_sizes_otherwise(case: str) -> None:
    """As remote code does, and with heads of every block its own."""
    model = tiny.make_model("llama")
    expected = sparsities(model, **RUNS[case])
    fields = vars(model.config)
    del fields["hidden_size"], fields["vocab_size"]
    fields["num_attention_heads"] = [fields["num_attention_heads"], 2, 1]
    np.testing.assert_array_equal(sparsities(model, **RUNS[case]), expected)


def test_capped_attention_stays_capped() -> None:
    """Gemma 2's; PyTorch's fused attention, else right on a CPU, leaves it out."""
    found = []
    for attention in ("eager", "sdpa"):
        model = tiny.make_model("gemma2", attn_implementation=attention)
        model.config.attn_logit_softcapping = 0.1
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = 0.1
        found.append(sparsities(model, **RUNS["search"]))
    np.testing.assert_array_equal(*found)


def test_configurations_are_as_they_were() -> None:
    model = tiny.make_model("llama", use_cache=True)
    sparsities(Wrapped(model), **RUNS["slope"])
    assert model.config.use_cache is True


# --- blocks ----------------------------------------------------------------------

TARGETS = [
    "LlamaDecoderLayer", ["LlamaDecoderLayer"], ["Linear"], ["LlamaAttention"],
    ["LlamaAttention", "LlamaMLP"], [r"re:model.layers.\d+$"], ["nonsense"], "Linear",
]  # fmt: skip


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_sequential_targets_of_any_kind(targets: Any, named: bool) -> None:
    model = tiny.make_model("llama")
    expected = list(find_blocks(model).linears())
    if not named:
        model._no_split_modules = None
    found = find_blocks(model, targets)
    assert list(found.linears()) == expected
    assert [b.name for b in found.blocks] == [f"model.layers.{i}" for i in range(3)]


@pytest.mark.parametrize("targets", [["Expert"], ["Linear"], None])
@pytest.mark.parametrize("own", [["Expert"], None])
def test_experts_in_a_plain_list_are_no_blocks(targets: Any, own: Any) -> None:
    class Expert(nn.Sequential):
        pass

    model = make_remote()
    for block in model.blocks:
        experts = [Expert(nn.Linear(32, 64), nn.Linear(64, 32)) for _ in range(4)]
        block.experts = nn.ModuleList(experts)
    model._no_split_modules = own
    assert len(find_blocks(model, targets)) == 3


def test_a_decoder_without_blocks_is_not_believed() -> None:
    """ModernBERT calls its output projection `decoder`."""
    model = tiny.make_model("llama")
    model.get_decoder = lambda: model.lm_head
    assert len(find_blocks(model)) == 3


def with_second_stack() -> PreTrainedModel:
    model = tiny.make_model("llama")
    kind = type(model.model.layers[0])
    model.model.more = nn.ModuleList([kind(model.config, 0)])
    return model


def test_a_second_stack_is_refused(tmp_path: Path) -> None:
    told = pytest.raises(ValueError, match=r"model\.more\.0, a Llama.*stay dense")
    with told:
        runs.run(with_second_stack(), [runs.absorption(), runs.pruner()], tmp_path)


def test_a_second_stack_that_is_ignored(tmp_path: Path, warnings: list[str]) -> None:
    recipe = [runs.absorption(ignore=["re:.*more.*"]), runs.pruner()]
    runs.run(with_second_stack(), recipe, tmp_path)
    assert not [line for line in warnings if "outside the decoder" in line]


def test_much_that_stays_dense_is_told(tmp_path: Path, warnings: list[str]) -> None:
    model = tiny.make_model("llama")
    model.tower = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    recipe = [runs.absorption(strength=0), runs.pruner()]
    runs.run(model, recipe, tmp_path)
    (told,) = [line for line in warnings if "outside the decoder" in line]
    assert "2 Linears" in told and "tower.0" in told and "ignore" in told


# --- blocks of remote code -------------------------------------------------------


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("block", OUTPUTS)
def test_whatever_a_block_returns(block: str, case: str) -> None:
    expected = sparsities(make_remote(), **RUNS[case])
    found = sparsities(make_remote(block=block), **RUNS[case])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("keyword", ["x", "hidden_states", "inputs"])
def test_whatever_a_block_calls_its_input(keyword: str, case: str) -> None:
    expected = sparsities(make_remote(), **RUNS[case])
    found = sparsities(make_remote(keyword=keyword), **RUNS[case])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("logits", LOGITS)
def test_whatever_a_model_returns(logits: str) -> None:
    expected = sparsities(make_remote(), **RUNS["search"])
    found = sparsities(make_remote(logits=logits), **RUNS["search"])
    np.testing.assert_array_equal(found, expected)


def test_a_block_without_a_hidden_state() -> None:
    model = make_remote()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: ([args[0]],))
        block.register_forward_hook(lambda module, args, output: output)
        forward = block.forward
        block.forward = lambda x, forward=forward: forward(x[0])
    with pytest.raises(ValueError, match="RemoteBlock is called without a hidden"):
        sparsities(model, **RUNS["slope"])


BATCHES = {
    "broadcasts": lambda x, samples: x + torch.zeros(samples, 1, 1),
    "fails": lambda x, samples: x.unflatten(0, (samples, -1)).flatten(0, 1),
}


@pytest.mark.parametrize("takes", BATCHES.values(), ids=BATCHES)
def test_a_block_that_knows_how_many_samples_there_are(takes: Callable) -> None:
    model, sizes = make_remote(), []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        sizes.append(len(kwargs["input_ids"]))

    def take(module: nn.Module, args: tuple) -> tuple:
        return takes(args[0], sizes[-1]), *args[1:]

    model.register_forward_pre_hook(note, with_kwargs=True)
    for block in model.blocks:
        block.register_forward_pre_hook(take)
    with pytest.raises(ValueError, match=r"block blocks\.0 .* cannot run some samples"):
        sparsities(model, **RUNS["search"])
    sparsities(model, **RUNS["search"], confirm_samples=0)


CHAINS = {
    "cache": r"block blocks\.\d \(RemoteBlock\) does not give the same",
    "between": r"block blocks\.1 \(RemoteBlock\) does not give the same",
    "random": r"block blocks\.0 \(RemoteBlock\) does not give the same",
    "loop": r"runs block blocks\.0 2 times",
    "order": "another order",
    "skip": r"does not run block blocks\.2",
}


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("oddity", CHAINS)
def test_what_is_no_chain_is_refused(oddity: str, case: str) -> None:
    model = make_remote(oddity=oddity)
    told = pytest.raises(ValueError, match=CHAINS[oddity] + r".*strength: 0")
    with tiny.counted({"model": model}) as forwards, told:
        sparsities(model, **RUNS[case])
    assert forwards["model"] <= 2
    assert len(sparsities(model, strength=0)) == 18


@pytest.mark.parametrize("case", [*RUNS, "base"])
def test_a_block_in_two_places_is_refused(case: str) -> None:
    model = tiny.make_model("llama")
    model.model.layers[2] = model.model.layers[0]
    fields = RUNS.get(case, {"strength": 0, "allocator": "owl"})
    with pytest.raises(ValueError, match="block 2 is block 0 once more.*strength: 0"):
        sparsities(model, **fields)
    assert len(sparsities(model, strength=0, allocator="alpha_pruning")) == 7


def test_a_head_that_fails_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'detach'")

    monkeypatch.setattr(OutputHead, "logits", fails)
    with pytest.raises(ValueError, match="output head.*NoneType.*strength: 0"):
        sparsities(make_remote(), **RUNS["search"])


def test_a_head_that_sees_more_than_the_last_block() -> None:
    model = make_remote(oddity="layers")
    with pytest.raises(ValueError, match="head makes other logits.*strength: 0"):
        sparsities(model, **RUNS["search"])
    sparsities(model, **RUNS["noise"])  # which takes no loss
    assert len(sparsities(model, strength=0)) == 18


def test_logits_of_the_last_token_alone() -> None:
    model = make_remote(oddity="last token")
    told = r"returns logits of shape \(1, 1, \d+\), not of every token.*strength: 0"
    with pytest.raises(ValueError, match=told):
        sparsities(model, **RUNS["search"])
    sparsities(model, **RUNS["noise"])


def test_blocks_that_run_without_gradients() -> None:
    model = make_remote(oddity="no grad")
    told = r"block blocks\.0 .* runs without gradients.*signal: response.*strength: 0"
    with pytest.raises(ValueError, match=told):
        sparsities(model, **RUNS["slope"])
    sparsities(model, **RUNS["search"], level="block")


class Twice(torch.nn.Linear):
    """As an adapter within a Linear: the weight is not all there is to it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Narrow(torch.nn.Linear):
    """Its weight is of another dtype than what it takes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.float(), self.bias.float())


class Alike(torch.nn.Linear):
    """A subclass that computes what a Linear does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("kind", [Twice, Narrow, Alike, "forward"])
def test_linears_that_compute_something_else(kind: Any) -> None:
    model = make_remote()
    up = model.blocks[1].up
    if kind == "forward":
        original = up.forward
        up.forward = lambda x: 2 * original(x)
    else:
        up.__class__ = kind
    if kind is Narrow:
        up.to(torch.bfloat16)
    if kind is Alike:
        sparsities(model, **RUNS["search"])
        return
    told = r"blocks\.1\.up \((Twice|Narrow|Linear)\) computes something else.*`ignore`"
    with pytest.raises(ValueError, match=told):
        sparsities(model, **RUNS["search"])
    blocks = find_blocks(model)
    keep = [name for name in blocks.linears() if not name.endswith(".up")]
    found = allocate(
        model,
        blocks.restrict(keep),
        [tiny.make_batch(6)],
        sparsity=0.5,
        pruner=PRUNERS["wanda"](),
        settings=runs.absorption(**RUNS["slope"]),
    )
    assert len(found.sparsity) == 15


@pytest.mark.parametrize("old", [False, True])
def test_weights_that_are_made_of_others_stay_dense(
    old: bool, tmp_path: Path, warnings: list[str]
) -> None:
    model = tiny.make_model("llama")
    norm = weight_norm if old else parametrizations.weight_norm
    for layer in model.model.layers[:2]:
        norm(layer.mlp.up_proj)
    runs.run(model, [runs.absorption(), runs.pruner()], tmp_path)
    (told,) = {line for line in warnings if "have no own weight" in line}
    assert told.startswith("2 Linears") and "model.layers.0.mlp.up_proj" in told
    zeros = [(x.mlp.up_proj.weight == 0).float().mean() for x in model.model.layers]
    assert zeros[0] == zeros[1] == 0 and zeros[2] > 0.2


def test_tokens_that_see_the_future() -> None:
    model = make_remote(oddity="bidirectional")
    with pytest.raises(ValueError, match="tokens see those after them.*strength: 0"):
        sparsities(model, **RUNS["search"])
    sparsities(model, **RUNS["noise"])  # which takes no loss


def test_a_sound_chain_of_every_architecture(any_model: PreTrainedModel) -> None:
    sparsities(any_model, **RUNS["slope"])


def test_linears_that_are_never_called(warnings: list[str]) -> None:
    sparsities(make_remote(oddity="uncalled"), **RUNS["slope"])
    (told,) = [line for line in warnings if "never called as modules" in line]
    assert "3 Linears" in told and "blocks.0.attention.query" in told
    assert "`ignore`, as 're:.*query'" in told


@pytest.mark.parametrize("fields", [RUNS["slope"], {"allocator": "owl", "strength": 0}])
def test_linears_that_no_pruner_calibrates(fields: dict[str, Any]) -> None:
    """DeepSeek's kv_b_proj, on which llm-compressor fails after the whole search."""
    model = make_remote(oddity="four dimensions")
    with pytest.raises(ValueError, match=r"attention\.query gets its input with 4 dim"):
        sparsities(model, **fields)


# --- heads -----------------------------------------------------------------------

HEADS = [
    "LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification",
    "LlamaForQuestionAnswering", "BertModel", "BertForMaskedLM",
    "ModernBertForMaskedLM",
]  # fmt: skip


def make_headed(name: str) -> PreTrainedModel:
    kind = getattr(transformers, name)
    shape = {k: v for k, v in tiny.SHAPE.items() if k != "attn_implementation"}
    more = {"cls_token_id": 1, "sep_token_id": 2, "num_labels": 3}
    return kind(kind.config_class(**shape, **more)).float().eval()


@pytest.mark.parametrize("name", HEADS)
def test_models_that_predict_no_next_token(name: str, tmp_path: Path) -> None:
    model = make_headed(name)
    for fields in ({"strength": "auto"}, {"strength": 0.1, "signal": "gradient"}):
        told = pytest.raises(ValueError, match=f"{name} .*means nothing.*strength: 0")
        with tiny.counted({"model": model}) as forwards, told:
            runs.run(model, [runs.absorption(**fields), runs.pruner()], tmp_path)
        assert forwards == {"model": 0}
        active_session().reset()


@pytest.mark.parametrize("name", HEADS[:2])
def test_the_remedy_helps(name: str, tmp_path: Path) -> None:
    for fields in ({"strength": 0}, {"strength": 0.1, "signal": "noise"}):
        model = make_headed(name)
        runs.run(model, [runs.absorption(**fields), runs.pruner()], tmp_path)
        zeros = runs.zeros(model, find_blocks(model).linears())
        assert all(sum(rows) for rows in zeros.values())
        active_session().reset()


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
def test_a_token_that_the_dense_model_cannot_take(kind: str) -> None:
    """Whichever sample has it: nothing is chosen by losses that are not finite."""
    model, refused = tiny.make_model("llama"), 0
    weight = model.model.embed_tokens.weight.data
    weight[tiny.VOCABULARY - 1] = torch.inf
    for position in range(0, 12, 2):
        batch = tiny.make_batch(12)
        batch["input_ids"] %= tiny.VOCABULARY - 1
        batch["input_ids"][position, 3:] = tiny.VOCABULARY - 1
        fields = {"strength": "auto", "signal": "auto", "rounds": 1}
        try:
            found = runs.allocate(model, [batch], kind=kind, **fields)
        except ValueError as error:
            assert re.search("NaN or infinity|not finite", str(error))
            refused += 1
            continue
        assert found.search is not None and found.confirmed is not None
        judged = [found.search.base_loss, *found.confirmed.losses.values()]
        assert np.isfinite(judged).all()
    assert refused > 3


# --- zeros that are there already ------------------------------------------------


def prune_unevenly(model: PreTrainedModel, share: float = 0.5) -> None:
    """Zeros in different numbers per row and per Linear, half of all weights."""
    generator = torch.Generator().manual_seed(0)
    for number, linear in enumerate(find_blocks(model).linears().values()):
        wanted = share + (0.2 if number % 2 else -0.2)
        drop = torch.rand(linear.weight.shape, generator=generator) < wanted
        linear.weight.data[drop] = 0


def realised(model: PreTrainedModel) -> float:
    weights = [x.weight for x in find_blocks(model).linears().values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


KEEPING: dict[str, tuple[str, dict[str, Any]]] = {
    "wanda": ("wanda", {}),
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt in blocks": ("sparsegpt", {"block_size": 8}),
    "sparsegpt that keeps zeros": ("sparsegpt", {"preserve_sparsity_mask": True}),
}


@pytest.mark.parametrize("sparsity", [0.55, 0.65])
@pytest.mark.parametrize("case", KEEPING)
def test_zeros_that_are_there_count(
    case: str, sparsity: float, tmp_path: Path, warnings: list[str]
) -> None:
    kind, fields = KEEPING[case]
    model = tiny.make_model("llama")
    prune_unevenly(model)
    pruner = runs.pruner(kind, sparsity=sparsity, **fields)
    runs.run(model, [runs.absorption(), pruner], tmp_path)
    # Wanda rounds down in rows of 32 columns
    assert realised(model) == pytest.approx(sparsity, abs=1 / 32)
    (told,) = [line for line in warnings if "are zero already" in line]
    assert f"sparsity={sparsity}" in told


@pytest.mark.parametrize("case", KEEPING)
def test_zeros_that_pruning_fills_do_not_count(case: str, tmp_path: Path) -> None:
    """SparseGPT makes up for what it prunes in all columns after it."""
    kind, fields = KEEPING[case]
    model = tiny.make_model("llama")
    for linear in find_blocks(model).linears().values():
        shares = torch.linspace(0.4, 0.8, linear.in_features)
        linear.weight.data[torch.rand(linear.weight.shape) < shares] = 0
    ours = runs.absorption(strength=0, allocator="uniform")
    runs.run(model, [ours, runs.pruner(kind, sparsity=0.65, **fields)], tmp_path)
    assert realised(model) == pytest.approx(0.65, abs=1 / 32)


@pytest.mark.parametrize("case", KEEPING)
def test_more_zeros_than_the_budget(case: str, tmp_path: Path) -> None:
    kind, fields = KEEPING[case]
    model = tiny.make_model("llama", hidden_size=16, intermediate_size=16)
    prune_unevenly(model, 0.7)
    recipe = [runs.absorption(), runs.pruner(kind, sparsity=0.3, **fields)]
    told = pytest.raises(ValueError, match="zeros that are there already.*Widen")
    with tiny.counted({"model": model}) as forwards, told:
        runs.run(model, recipe, tmp_path)
    assert forwards == {"model": 0}


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("strength", [0, 0.2])
def test_a_linear_that_is_all_zero(kind: str, strength: float, tmp_path: Path) -> None:
    """As the projections of a block that LLaMA Pro adds."""
    model = tiny.make_model("llama", hidden_size=16, intermediate_size=16)
    layer = model.model.layers[1]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    recipe = [runs.absorption(strength=strength), runs.pruner(kind, sparsity=0.5)]
    runs.run(model, recipe, tmp_path)
    assert realised(model) == pytest.approx(0.5, abs=0.04)
    assert layer.mlp.down_proj.weight.count_nonzero() == 0


def test_a_dense_model_has_the_budget_it_had() -> None:
    blocks = find_blocks(tiny.make_model("llama"))
    budget = Budget.of(np.ones(len(blocks.linears())), 0.5, 0.9)
    for pruner in (PRUNERS["wanda"](), SparseGPT(preserve=True)):
        assert ModelZeros.of(blocks, pruner).within(budget) is budget


def test_features_that_are_always_zero_count() -> None:
    """SparseGPT zeroes their weights before it compares with the sparsity asked for."""
    model = tiny.make_model("llama")
    blocks = find_blocks(model)
    linears = blocks.linears()
    first = next(iter(linears))
    next(iter(linears.values())).weight.data[0, 0] = 0  # else nothing is counted
    seen = {name: torch.ones(x.in_features) for name, x in linears.items()}
    seen[first][:16] = 0
    budget = Budget.of(np.ones(len(linears)), 0.5, 0.9)
    zeros = ModelZeros.of(blocks, SparseGPT(preserve=True), seen)
    found = zeros.within(budget)
    assert found.low[0] == pytest.approx(0.5, abs=1e-3) and found.low[0] >= 0.5
    assert not found.low[1:].any()


def test_features_that_nothing_uses_count(tmp_path: Path) -> None:
    """Neurons that were removed: SparseGPT zeroes the columns that read them."""
    model = tiny.make_model("llama")
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data[:30] = 0
    recipe = [runs.absorption(), runs.pruner("sparsegpt", sparsity=0.5)]
    runs.run(model, recipe, tmp_path)
    assert realised(model) == pytest.approx(0.5, abs=2e-3)


def test_a_model_is_pruned_twice_alike(tmp_path: Path) -> None:
    model = tiny.make_model("llama", hidden_size=128, intermediate_size=128)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        ours = runs.absorption(allocator="uniform", strength=0)
        recipe = [ours, runs.pruner("sparsegpt", sparsity=0.5)]
        runs.run(model, recipe, tmp_path / name)
        assert 0.5 < realised(model) < 0.5003


# --- zeros that are filled -------------------------------------------------------


class Filling(Modifier):
    """What nobody has a name for: changes weights wherever it stands."""

    share: float = 0.25
    requires_calibration_data: bool = False
    late: bool = False

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        return True

    def on_event(self, state: Any, event: Any, **kwargs: Any) -> None:
        if event.type_.value.startswith("calibration_e") and not self.late:
            self.fill(state.model)

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        if self.late:
            self.fill(state.model)
        return True

    def fill(self, model: PreTrainedModel) -> None:
        for linear in find_blocks(model).linears().values():
            zeros = (linear.weight == 0).nonzero()
            rows, columns = zeros[: int(len(zeros) * self.share)].T
            linear.weight.data[rows, columns] = 1.0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("pipeline", ["independent", "basic"])
def test_zeros_that_are_filled_are_told(
    pipeline: str, late: bool, tmp_path: Path, warnings: list[str]
) -> None:
    recipe = [runs.absorption(report_dir=tmp_path / "r"), runs.pruner()]
    model = tiny.make_model("llama")
    runs.run(model, [*recipe, Filling(late=late)], tmp_path, pipeline=pipeline)
    (told,) = [line for line in warnings if "are filled" in line]
    assert "of the zeros that WandaPruningModifier made" in told and "Filling" in told
    assert profile(tmp_path)["zeros_lost"] == pytest.approx(0.25, abs=0.01)


def test_zeros_that_stay_are_told_as_well(tmp_path: Path, warnings: list[str]) -> None:
    recipe = [runs.absorption(report_dir=tmp_path / "r"), runs.pruner()]
    recipe.append(Filling(share=0.0))
    runs.run(tiny.make_model("llama"), recipe, tmp_path)
    assert profile(tmp_path)["zeros_lost"] == 0
    assert not [line for line in warnings if "are filled" in line]


def test_nothing_is_kept_where_nothing_could_fill(tmp_path: Path) -> None:
    recipe = [runs.absorption(report_dir=tmp_path / "r"), runs.pruner()]
    runs.run(tiny.make_model("llama"), recipe, tmp_path)
    assert profile(tmp_path)["zeros_lost"] is None


def profile(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "r" / "profile.json").read_text())


# --- contexts --------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "deterministic": deterministic,
}
CALLS = RUNS | {
    "pruner": {"signal": "pruner", "strength": 0.2, "kind": "sparsegpt"},
    "weights": {"allocator": "alpha_pruning", "strength": 0},
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_same_in_any_context(context: str, case: str) -> None:
    model, batch = tiny.make_model("llama"), tiny.make_batch(4)
    expected = sparsities(model, [batch], **CALLS[case])
    with CONTEXTS[context]():
        before = state()
        found = sparsities(model, read_batches([batch]), **CALLS[case])
        assert state() == before
    np.testing.assert_array_equal(found, expected)


def state() -> list[object]:
    return [
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ]


def test_a_loader_that_is_read_in_inference_mode() -> None:
    model = tiny.make_model("llama")
    expected = sparsities(model, [tiny.make_batch(4)], **RUNS["slope"])
    with torch.inference_mode():
        batch = {name: rows.clone() for name, rows in tiny.make_batch(4).items()}
        assert batch["input_ids"].is_inference()
        batches = read_batches([batch])
    found = sparsities(model, batches, **RUNS["slope"])
    np.testing.assert_array_equal(found, expected)


def test_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        model = tiny.make_model("llama")
    expected = sparsities(tiny.make_model("llama"), **RUNS["search"])
    np.testing.assert_array_equal(sparsities(model, **RUNS["search"]), expected)
    with pytest.raises(ValueError, match="inference_mode.*Load the model outside"):
        sparsities(model, **RUNS["slope"])


# --- calibration batches ---------------------------------------------------------


def plain() -> dict[str, torch.Tensor]:
    return tiny.make_batch(4, padding="right")


BATCHES: dict[str, Callable[[], Any]] = {
    "int32": lambda: {n: x.int() for n, x in plain().items()},
    "int16": lambda: {n: x.short() for n, x in plain().items()},
    "uint8": lambda: {n: x.to(torch.uint8) for n, x in plain().items()},
    "a mask of bools": lambda: (
        plain() | {"attention_mask": plain()["attention_mask"].bool()}
    ),
    "a mask of floats": lambda: (
        plain() | {"attention_mask": plain()["attention_mask"].float()}
    ),
    "lists": lambda: {n: x.tolist() for n, x in plain().items()},
    "numpy": lambda: {n: x.numpy() for n, x in plain().items()},
    "text": lambda: plain() | {"text": ["a", "b", "c", "d"]},
    "labels": lambda: plain() | {"labels": plain()["input_ids"]},
    "an id per sample": lambda: plain() | {"row": torch.arange(4)},
    "embeddings as well": lambda: plain() | {"inputs_embeds": torch.zeros(4, 12, 32)},
    "a trainer's": lambda: (
        plain() | {"num_items_in_batch": torch.tensor(48), "step": torch.tensor(1)}
    ),
    "a generation loop's": lambda: plain() | {"cache_position": torch.arange(12)},
    "BatchEncoding": lambda: transformers.BatchEncoding(plain()),
}


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("kind", BATCHES)
def test_batches_as_people_have_them(kind: str, case: str) -> None:
    model = tiny.make_model("llama")
    expected = sparsities(model, read_batches([plain()]), **RUNS[case])
    batches = read_batches([BATCHES[kind]()])
    assert batches[0]["input_ids"].dtype == torch.int64
    np.testing.assert_array_equal(sparsities(model, batches, **RUNS[case]), expected)


@pytest.mark.parametrize("case", RUNS)
def test_positions_that_all_samples_share(case: str) -> None:
    shared = plain() | {"position_ids": torch.arange(12)[None]}
    own = plain() | {"position_ids": torch.arange(12).repeat(4, 1)}
    model = tiny.make_model("llama")
    found, expected = (
        sparsities(model, read_batches([one]), **RUNS[case]) for one in (shared, own)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
def test_a_loader_of_a_stream(kind: str, tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            return iter([tiny.make_batch(1, seed=i) for i in range(6)])

    loader = DataLoader(Stream(), batch_size=None)
    model = tiny.make_model("llama")
    recipe = [runs.absorption(), runs.pruner(kind)]
    runs.run(model, recipe, tmp_path, dataset=loader, pipeline="basic")
    assert realised(model) == pytest.approx(0.5, abs=0.04)


def test_a_sample_without_a_batch_dimension() -> None:
    rows = [{n: x[i] for n, x in plain().items()} for i in range(4)]
    found = read_batches(rows)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(1, 12)] * 4


IDS = torch.ones(2, 4, dtype=torch.int64)
REFUSED: dict[str, tuple[Any, str]] = {
    "no mapping": ((IDS, IDS), "is a list: give a dict"),
    "embeddings alone": (
        {"inputs_embeds": torch.ones(2, 4, 8)},
        "Give the ids instead",
    ),
    "floats": ({"input_ids": IDS.float()}, "float32: token ids are integers"),
    "bools": ({"input_ids": IDS.bool()}, "bool: token ids are integers"),
    "three dimensions": ({"input_ids": IDS[None]}, r"shape \(1, 2, 4\): give \(batch"),
    "lists of unequal length": ({"input_ids": [[1], [1, 2]]}, "pad the samples"),
    "torch's own collator": ({"input_ids": list(IDS.T)}, "DataCollatorWithPadding"),
    "negative": ({"input_ids": -IDS}, "hold -1, which is no token"),
    "a mask of another size": (
        {"input_ids": IDS, "attention_mask": IDS[:, :3]},
        r"attention_mask.*\(2, 3\)",
    ),
    "one empty": (None, "have no token.*leave empty rows"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_batches_that_are_refused(kind: str) -> None:
    batch, message = REFUSED[kind]
    batches = [batch] if batch else [{"input_ids": IDS}, {"input_ids": IDS[:, :0]}]
    with pytest.raises(ValueError, match=message):
        read_batches(DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def test_ids_that_the_model_does_not_know() -> None:
    batch = plain()
    batch["input_ids"][0, 3] = 1000
    model = tiny.make_model("llama")
    told = pytest.raises(ValueError, match="input_ids.*1000.*64.*tokenizer")
    with tiny.counted({"model": model}) as forwards, told:
        sparsities(model, [batch], strength=0)
    assert forwards == {"model": 0}


# --- images ----------------------------------------------------------------------

IMAGE, PATCHES = 62, 16


def with_images(samples: int = 4, tokens: int = 40) -> list[dict[str, torch.Tensor]]:
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(samples):
        ids = torch.randint(3, 60, (1, tokens), generator=generator)
        ids[0, 4 : 4 + PATCHES] = IMAGE
        pixels = torch.randn(1, 3, 16, 16, generator=generator)
        mask = torch.ones_like(ids)
        batches.append(
            {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        )
    return batches


def make_llava() -> PreTrainedModel:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, image_size=16, patch_size=4,
    )  # fmt: skip
    text = transformers.LlamaConfig(**tiny.SHAPE)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE,
        image_token_id=IMAGE, image_seq_length=PATCHES,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).float().eval()


@pytest.mark.parametrize("memory", [1, 2**30])
@pytest.mark.parametrize("case", RUNS)
def test_images_are_not_cut(case: str, memory: int) -> None:
    """Windows of 8 tokens would end among those of the image."""
    fields = RUNS[case] | {"probe_tokens": 8, "probe_memory": memory}
    found = sparsities(make_llava(), with_images(), **fields)
    assert np.isfinite(found).all() and len(found) == 21


def test_images_of_several_samples_in_one() -> None:
    batch = {"input_ids": IDS, "pixel_values": torch.ones(5, 8)}
    with pytest.raises(
        ValueError, match="'pixel_values' for all of them.*batch_size=1"
    ):
        sparsities(tiny.make_model("llama"), [batch], strength=0)


def test_placeholders_are_not_predicted() -> None:
    model = make_llava()
    head = OutputHead(model, find_blocks(model).modules)
    assert head.placeholders == [IMAGE]
    (batch,) = with_images(1)
    hidden = torch.randn(1, 40, 32)
    head.output = torch.empty(0)
    ((_, counted),) = cross_entropy_sums(head, batch, hidden)
    assert counted == 39 - PATCHES
