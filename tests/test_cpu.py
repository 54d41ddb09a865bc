import pytest
import torch
from helpers import tiny

from absorb_plugin import cpu
from absorb_plugin.calibration import calibrating


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(cpu, "bfloat16_is_slow", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_rounded_float32_product(slow, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(300, 20, bias=bias).bfloat16()
    x = torch.randn(7, 300).bfloat16()
    with torch.no_grad(), cpu.fast_bfloat16():
        fast = linear(x)
    with torch.no_grad():
        exact = linear.float()(x.float())
    assert fast.dtype == torch.bfloat16
    assert torch.equal(fast, exact.bfloat16())


def test_matmul_is_the_rounded_float32_product(slow):
    torch.manual_seed(0)
    a, b = torch.randn(2, 7, 300).bfloat16(), torch.randn(2, 300, 5).bfloat16()
    exact = (a.float() @ b.float()).bfloat16()
    with cpu.fast_bfloat16():
        for fast in (torch.matmul(a, b), a.matmul(b), a @ b):
            assert torch.equal(fast, exact)


def test_float32_is_left_alone(slow):
    torch.manual_seed(0)
    linear = torch.nn.Linear(30, 20)
    x = torch.randn(7, 30)
    with cpu.fast_bfloat16():
        inside = linear(x)
    assert torch.equal(inside, linear(x))


def test_nothing_changes_where_bfloat16_is_fast(monkeypatch):
    monkeypatch.setattr(cpu, "bfloat16_is_slow", lambda: False)
    with cpu.fast_bfloat16():
        assert torch.overrides._len_torch_function_stack() == 0


def test_mode_ends_with_the_block(slow):
    with cpu.fast_bfloat16():
        assert torch.overrides._len_torch_function_stack() == 1
    assert torch.overrides._len_torch_function_stack() == 0


def test_bfloat16_is_slow_where_float32_takes_less_time(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(cpu, "_times_as_long", lambda: 1.8)
    assert cpu.bfloat16_is_slow()
    monkeypatch.setattr(cpu, "_times_as_long", lambda: 0.5)
    assert not cpu.bfloat16_is_slow()


def test_bfloat16_is_slow_without_instructions_for_it(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(cpu, "_times_as_long", lambda: 0.5)
    assert cpu.bfloat16_is_slow()


def test_products_are_timed_once(monkeypatch):
    products = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda *args: products.append(args[0].dtype) or linear(*args),
    )
    cpu._times_as_long.cache_clear()
    assert cpu._times_as_long() == cpu._times_as_long() > 0
    assert products == [torch.float32, torch.bfloat16] * cpu.REPETITIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_a_model_in_bfloat16_is_looked_at(slow, dtype):
    model = tiny.small().to(dtype)
    model.model.norm.float()  # a norm in float32 makes no difference
    with calibrating(model):
        modes = torch.overrides._len_torch_function_stack()
    assert modes == (dtype == torch.bfloat16)
