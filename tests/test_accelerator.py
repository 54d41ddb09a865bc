"""
What runs on an accelerator, on one that is not there: device mixes and `.numpy()` on
device tensors raise, and what comes out is what comes out on the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from compressed_tensors.offload import set_onload_device
from helpers import runs, tiny
from helpers.fake_accelerator import DeviceMix, FakeDevice, fake_accelerator, on_host
from transformers import PreTrainedModel

from absorb_plugin.allocate import Allocation
from absorb_plugin.devices import computing_on_one_device
from absorb_plugin.evaluation.allocation import allocate_model
from absorb_plugin.precision import widest_float
from absorb_plugin.pruners import SparseGPT, thresholds
from absorb_plugin.pruners.thresholds import global_threshold, row_thresholds
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.signals import SIGNALS
from absorb_plugin.signals.noise_scan import scan_noise

SEARCH = {"strength": "auto", "rounds": 1, "search_samples": 2}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "owl": ("wanda", {"allocator": "owl"}),
    "dlp": ("wanda", {"allocator": "dlp"}),
    "alpha_pruning": ("wanda", {"allocator": "alpha_pruning"}),
    "response": ("wanda", {"signal": "response"}),
    "noise": ("wanda", {"signal": "noise"}),
    "noise, float32": (
        "wanda",
        {"signal": "noise", "signal_args": {"dtype": "float32"}},
    ),
    "linear": ("wanda", {"granularity": "linear", "level": "linear"}),
    "search": ("wanda", SEARCH),
    "sparsegpt": ("sparsegpt", SEARCH),
    "pruner": ("sparsegpt", {"signal": "pruner", "level": "linear"}),
}


def make_model(kind: str) -> PreTrainedModel:
    """Attention on the CPU as on an accelerator: fused, sums have another order."""
    model = tiny.make_model(kind)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with fake_accelerator() as found:
        yield found


@pytest.fixture
def two_devices() -> Iterator[FakeDevice]:
    with fake_accelerator(2) as found:
        yield found


def offloaded(model: PreTrainedModel) -> PreTrainedModel:
    """Weights on the CPU, each onloaded while it is used."""
    return set_onload_device(model, torch.device("fake:0"))


def over_two(model: PreTrainedModel) -> PreTrainedModel:
    """As `from_pretrained(device_map="auto")` spreads a model over two devices."""
    last = len(model.model.layers) - 1
    devices = {"model.embed_tokens": "fake:0", "model.rotary_emb": "fake:0"}
    devices |= {f"model.layers.{i}": "fake:0" for i in range(last)}
    devices |= {f"model.layers.{last}": "fake:1"}
    devices |= {"model.norm": "fake:1", "lm_head": "fake:1"}
    return dispatch_model(model, devices, main_device="fake:0", force_hooks=True)


def allocated(
    model: PreTrainedModel, pruner: str = "wanda", **fields: Any
) -> Allocation:
    settings, samples = AllocationSettings(**fields), tiny.make_dataset(6)
    return allocate_model(model, samples, 0.5, settings, pruner=pruner)


def test_devices_must_not_be_mixed(two_devices: FakeDevice) -> None:
    first, second = torch.ones(2, device="fake:0"), torch.ones(2, device="fake:1")
    for other in (second, torch.ones(2)):
        with pytest.raises(DeviceMix, match="takes tensors of one device"):
            first + other
    assert (first + torch.tensor(1.0)).device == torch.device("fake:0")
    assert (first + second.to("fake:0")).tolist() == [2, 2]


def test_numpy_takes_no_device_tensor(device: FakeDevice) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        torch.ones(2, device="fake").numpy()


def test_there_is_no_third_device(two_devices: FakeDevice) -> None:
    with pytest.raises(RuntimeError, match="there are 2 devices"):
        torch.ones(2).to("fake:2")


def test_copies_are_counted(device: FakeDevice) -> None:
    there = torch.ones(6).to("fake")
    there.sum().item()
    assert device.log["to device"] == device.log["to host"] == 1
    assert device.log["bytes to device"] == 24


def test_data_can_be_replaced(device: FakeDevice) -> None:
    weight = torch.nn.Parameter(torch.ones(2, device="fake"))
    narrow = weight.data
    weight.data = 2 * weight.data.double()
    assert weight.tolist() == [2, 2] and weight.dtype == torch.float64
    weight.data = narrow
    assert weight.tolist() == [1, 1] and weight.dtype == torch.float32


def test_outside_there_is_no_accelerator() -> None:
    with fake_accelerator():
        assert torch.accelerator.is_available()
    assert not torch.accelerator.is_available()


@pytest.mark.parametrize("counts", [[3], [0, 3, 5]])
def test_thresholds(device: FakeDevice, counts: list[int]) -> None:
    scores = torch.rand(4, 7)
    found = row_thresholds(scores.to("fake"), counts)
    assert torch.equal(on_host(found), row_thresholds(scores, counts))
    found = global_threshold(scores.to("fake"), 11)
    assert torch.equal(on_host(found), global_threshold(scores, 11))


@pytest.mark.parametrize("margin", [thresholds.MARGIN, 0])
def test_threshold_of_a_large_tensor(
    device: FakeDevice, margin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a sample of it; and by all of it where the sample points beside it."""
    scores = torch.rand(2**19 + 3)
    monkeypatch.setattr(thresholds, "MARGIN", margin)
    for rank in (0, 2**18, 2**19 + 2):
        found = global_threshold(scores.to("fake"), rank)
        assert torch.equal(on_host(found), global_threshold(scores, rank))


@pytest.mark.parametrize("name", list(RECIPES))
def test_oneshot(name: str, tmp_path: Path) -> None:
    kind, fields = RECIPES[name]
    found = []
    for devices in (0, 1, 2) if fields is SEARCH else (0, 1):
        folder = tmp_path / str(devices)
        folder.mkdir()
        model, pruner = make_model("llama"), runs.pruner(kind)
        recipe = [runs.absorption(**fields), pruner]
        with fake_accelerator(devices) if devices else nullcontext() as device:
            model = over_two(model) if devices > 1 else model
            runs.run(model, recipe, folder)
        assert not devices or device.log["to device"] > 0
        found.append(pruner.sparsity)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-6)


def test_candidates_are_pruned_at_once_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A walk of many small steps is one for all of them, on an accelerator."""
    sets: list[int] = []
    original = SparseGPT.prune_each

    def counted(self: SparseGPT, weights: Any, observed: Any, *rest: Any) -> Any:
        sets.append(len(observed))
        return original(self, weights, observed, *rest)

    monkeypatch.setattr(SparseGPT, "prune_each", counted)
    # what is found differs from the base, whatever the tiny model says
    monkeypatch.setattr("absorb_plugin.search.line_search.gain", lambda *a: (1.0, 0.0))
    fields = {"signal": "gradient", **SEARCH, "confirm_samples": 2}
    expected = allocated(make_model("llama"), pruner="sparsegpt", **fields)
    assert set(sets) == {1}
    sets.clear()
    with fake_accelerator():
        model = offloaded(make_model("llama"))
        found = allocated(model, pruner="sparsegpt", **fields)
    assert max(sets) == 3
    np.testing.assert_allclose(found.sparsity, expected.sparsity, rtol=0, atol=1e-6)
    sets.clear()
    with fake_accelerator():
        model = offloaded(make_model("llama"))
        found = allocated(model, pruner="sparsegpt", probe_memory=100_000, **fields)
    assert set(sets) == {1}
    np.testing.assert_allclose(found.sparsity, expected.sparsity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("signal", list(SIGNALS))
def test_allocate_offloaded(signal: str) -> None:
    fields = {"signal": signal, **SEARCH}
    expected = allocated(make_model("llama"), **fields)
    with fake_accelerator():
        found = allocated(offloaded(make_model("llama")), **fields)
    np.testing.assert_allclose(found.sparsity, expected.sparsity, rtol=0, atol=1e-6)


def test_some_devices_refuse_float64() -> None:
    with fake_accelerator(float64=False):
        there = torch.ones(2).to("fake")
        with pytest.raises(TypeError, match="support float64"):
            there.double()


def without_float64(fields: dict[str, Any]) -> None:
    """An allocation on a device that has none, as Apple's, is that of the CPU."""
    expected = allocated(make_model("llama"), **fields)
    widest_float.cache_clear()
    with fake_accelerator(float64=False):
        found = allocated(offloaded(make_model("llama")), **fields)
        assert widest_float(torch.device("fake:0")) == torch.float32
    widest_float.cache_clear()
    np.testing.assert_allclose(found.sparsity, expected.sparsity, rtol=0, atol=1e-4)


@pytest.mark.parametrize("signal", list(SIGNALS))
def test_signals_without_float64(signal: str) -> None:
    without_float64({"signal": signal, **SEARCH})


@pytest.mark.parametrize("allocator", ["owl", "dlp", "lsa", "alpha_pruning"])
def test_allocators_without_float64(allocator: str) -> None:
    without_float64({"allocator": allocator, "strength": 0})


def to_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """As `from_pretrained(device_map="auto")` where the device has no room."""
    parts = [name for name, _ in model.model.named_children() if name != "layers"]
    devices = {f"model.{name}": "cpu" for name in parts} | {"lm_head": "cpu"}
    devices |= {f"model.layers.{i}": "cpu" for i in range(len(model.model.layers))}
    return dispatch_model(model, devices, main_device="fake:0", force_hooks=True)


def to_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """
    From a checkpoint in safetensors that stays where it is. On the CPU: safetensors
    reads straight to a device, and knows no fake one.
    """
    model.save_pretrained(folder / "model")
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    parts |= {"model.norm": "cpu", "lm_head": "cpu", "model.layers": "disk"}
    return type(model).from_pretrained(
        folder / "model",
        device_map=parts,
        offload_folder=folder / "offload",
        attn_implementation=model.config._attn_implementation,
    )


@pytest.mark.parametrize("spread", [over_two, to_cpu])
@pytest.mark.parametrize("signal", list(SIGNALS))
def test_allocate_as_accelerate_spreads_it(
    signal: str, spread: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    fields = {"signal": signal, **SEARCH}
    expected = allocated(make_model("llama"), **fields)
    with fake_accelerator(2):
        found = allocated(spread(make_model("llama")), **fields)
    np.testing.assert_allclose(found.sparsity, expected.sparsity, rtol=0, atol=1e-6)


def test_allocate_from_disk(tmp_path: Path) -> None:
    expected = allocated(make_model("llama"), **SEARCH)
    found = allocated(to_disk(make_model("llama"), tmp_path), **SEARCH)
    np.testing.assert_allclose(found.sparsity, expected.sparsity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spread", [offloaded, over_two, to_cpu])
def test_noise(spread: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    data = tiny.make_dataset(4)
    expected = scan_noise(make_model("llama"), data, [0.1])
    with fake_accelerator(2):
        found = scan_noise(spread(make_model("llama")), data, [0.1])
    ratios = [x.profiles[0].ratio for x in (found, expected)]
    np.testing.assert_allclose(*ratios, rtol=1e-5)


def test_a_model_on_one_device_stays_as_it_is() -> None:
    model = make_model("llama")
    before = tiny.snapshot(model)
    with computing_on_one_device(model):
        assert type(model.lm_head._parameters) is dict
    tiny.assert_untouched(model, before)


def test_a_dispatched_model_computes_afterwards_where_it_did() -> None:
    with fake_accelerator(2):
        model = make_model("llama")
        set_onload_device(model, torch.device("fake:0"))
        set_onload_device(model.lm_head, torch.device("fake:1"))
        with computing_on_one_device(model):
            assert model.lm_head.weight.device == torch.device("fake:0")
        assert model.lm_head.weight.device == torch.device("fake:1")
        assert model.model.norm.weight.device == torch.device("fake:0")
