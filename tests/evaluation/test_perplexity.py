import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from datasets import Dataset
from helpers import tiny
from helpers.words import make_model

import absorb_plugin.evaluation.perplexity as evaluation
from absorb_plugin._llmcompressor import linearize_moe
from absorb_plugin.evaluation.perplexity import linear_sparsity, perplexity
from absorb_plugin.evaluation.tasks import Request, loglikelihoods
from absorb_plugin.signals.noise_scan import scan_noise


@pytest.fixture
def windows() -> list[list[int]]:
    tokens = torch.randint(3, 63, (3, 40), generator=torch.Generator().manual_seed(1))
    # of unequal length, so that a mean of means would differ
    return [tokens[0].tolist(), tokens[1, :17].tolist(), tokens[2, :2].tolist()]


def plain_perplexity(model, windows) -> float:
    """Token by token in float64, without anything shared with the code under test."""
    nll = []
    with torch.no_grad():
        for window in windows:
            scores = model(torch.tensor([window])).logits[0].double()
            for position, token in enumerate(window[1:]):
                row = scores[position]
                nll.append(float(torch.logsumexp(row, 0) - row[token]))
    return math.exp(sum(nll) / len(nll))


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_perplexity_is_that_of_a_plain_computation(windows, rows, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS", rows)
    model = make_model()
    value, tokens = perplexity(model, windows, progress=False)
    assert tokens == 39 + 16 + 1
    assert value == pytest.approx(plain_perplexity(model.eval(), windows), rel=1e-5)


def test_softmax_is_float32_for_16_bit_models(windows):
    model = make_model().to(torch.bfloat16)
    value, _ = perplexity(model, windows, progress=False)
    assert value == pytest.approx(plain_perplexity(model.eval(), windows), rel=1e-5)


def test_model_is_left_in_its_mode(windows):
    model = make_model().train()
    perplexity(model, windows, progress=False)
    assert model.training


def test_progress_goes_to_stderr(windows, capsys):
    perplexity(make_model(), windows)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Perplexity" in captured.err


def test_logits_that_are_not_finite(windows):
    model = make_model()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="not finite in window 0"):
        perplexity(model, windows, progress=False)


def test_a_loss_whose_exponential_overflows(windows):
    model = make_model()
    model.lm_head.weight.data *= 1e6
    assert perplexity(model, windows, progress=False)[0] == math.inf


@pytest.mark.parametrize("nothing", [[], [[4]]])
def test_nothing_to_predict(nothing):
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(make_model(), nothing, progress=False)


ASKED = {
    "perplexity": lambda model: perplexity(model, [[1, 2, 3], [4, 1000]]),
    "tasks": lambda model: loglikelihoods(model, [Request((4, 1000), 1)]),
    "noise": lambda model: scan_noise(
        model, Dataset.from_dict({"input_ids": [[4, 1000]]}), [0.1]
    ),
}


@pytest.mark.parametrize("asked", ASKED)
def test_ids_that_the_model_does_not_know(asked):
    model = tiny.make_model("llama")
    told = pytest.raises(ValueError, match="input_ids.*1000.*64.*tokenizer")
    with tiny.counted({"model": model}) as forwards, told:
        ASKED[asked](model)
    assert forwards == {"model": 0}


def test_linear_sparsity_leaves_out_the_head():
    model = make_model()
    assert linear_sparsity(model) == 0
    model.lm_head.weight.data.zero_()
    assert linear_sparsity(model) == 0
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data[:16].zero_()
    blocks = sum(
        module.weight.numel()
        for module in model.model.modules()
        if isinstance(module, torch.nn.Linear)
    )
    assert linear_sparsity(model) == pytest.approx(2 * 16 * 32 / blocks)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "granitemoe"])
def test_linear_sparsity_counts_experts_in_one_tensor(architecture):
    """As of the Linears that llm-compressor makes of them."""
    model = tiny.make_model(architecture)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "experts" in name and "bias" not in name:
                weight[:, ::2] = 0
            elif "experts" in name:
                weight.zero_()
    found = linear_sparsity(model)
    linearize_moe(model)
    assert 0.2 < found < 0.5
    assert found == pytest.approx(linear_sparsity(model))


def test_experts_of_packed_weights_are_not_counted():
    model = tiny.make_model("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    packed = torch.zeros(4, 8, 8, dtype=torch.uint8)
    experts.down_proj = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match="experts are packed"):
        linear_sparsity(model)


def test_a_scheme_of_inputs_alone_leaves_weights_as_they_are():
    model = make_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.quantization_scheme = QuantizationScheme(targets=["Linear"])
            module.quantization_status = QuantizationStatus.COMPRESSED
    assert linear_sparsity(model) == 0


def test_linear_sparsity_needs_linears():
    model = make_model()
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="no Linear"):
        linear_sparsity(model)
