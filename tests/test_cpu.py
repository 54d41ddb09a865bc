import pytest
import torch

from absorb_plugin import cpu


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


def test_nothing_changes_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with cpu.fast_bfloat16():
        assert torch.overrides._len_torch_function_stack() == 0


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(cpu, "bfloat16_is_slow", lambda: False)


def attention_case(which):
    """Queries, keys and values, and how torch is asked."""
    generator = torch.Generator().manual_seed(0)
    tokens = cpu.SHORT + 1 if which == "long" else 40
    heads = 2 if which == "shared keys" else 6
    shape = (3, 6, tokens, 16)
    tensors = [
        torch.randn((3, count, *shape[2:]), generator=generator).bfloat16()
        for count in (6, heads, heads)
    ]
    seen = torch.ones(3, 1, tokens, tokens, dtype=torch.bool).tril()
    seen[1, :, :, :4] = False  # of one sample four are padding
    named = {
        "causal": {"is_causal": True},
        "shared keys": {"is_causal": True, "enable_gqa": True},
        "all": {"scale": 0.3},
        "mask": {"attn_mask": seen[:1]},
        "mask of each": {"attn_mask": seen | torch.eye(tokens, dtype=torch.bool)},
        "bias": {"attn_mask": torch.randn(6, tokens, tokens, generator=generator)},
        "bias of heads": {
            "attn_mask": torch.randn(3, 6, tokens, tokens, generator=generator)
        },
        "nothing to see": {"attn_mask": seen},
        "long": {"is_causal": True},
    }[which]
    if "attn_mask" in named and named["attn_mask"].is_floating_point():
        named["attn_mask"] = named["attn_mask"].bfloat16()
    return tensors, named


@pytest.mark.parametrize("cached", [1, 2**20])
@pytest.mark.parametrize(
    "which, ours",
    [
        ("causal", True),
        ("shared keys", True),
        ("all", True),
        ("mask", True),
        ("mask of each", True),
        ("bias", True),
        ("bias of heads", True),
        ("nothing to see", False),
        ("long", False),
    ],
)
def test_attention_by_products(fast, which, ours, cached, monkeypatch):
    """That of torch in float32 but for roundings, and its gradients."""
    monkeypatch.setattr(cpu, "CACHED", cached)
    tensors, named = attention_case(which)
    attend = torch.nn.functional.scaled_dot_product_attention
    wide = [x.float().requires_grad_() for x in tensors]
    mask = named.get("attn_mask")
    in_float = dict(named)
    if mask is not None and mask.is_floating_point():
        in_float["attn_mask"] = mask.float()
    exact = attend(*wide, **in_float)
    narrow = [x.clone().requires_grad_() for x in tensors]
    assert (cpu._attention(*narrow, **named) is not None) == ours
    with cpu.fast_bfloat16():
        found = attend(*narrow, **named)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    torch.testing.assert_close(found.float(), exact, rtol=0.03, atol=0.03)
    direction = torch.randn_like(exact)
    gradients = torch.autograd.grad(found, narrow, direction.bfloat16())
    expected = torch.autograd.grad(exact, wide, direction)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("oddity", ["float32", "dropout", "three dimensions"])
def test_attention_that_is_left_to_torch(oddity):
    tensors, named = attention_case("causal")
    if oddity == "float32":
        tensors = [x.float() for x in tensors]
    elif oddity == "dropout":
        named["dropout_p"] = 0.5
    else:
        tensors = [x[0] for x in tensors]
    assert cpu._attention(*tensors, **named) is None


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
