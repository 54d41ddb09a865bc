"""Pruned weights, packed: they come back to the bit, and a zero takes a bit."""

import pytest
import torch
from helpers.fake_accelerator import fake_accelerator, on_host
from hypothesis import given
from hypothesis import strategies as st

from absorb_plugin.pruners import packed as packed_module
from absorb_plugin.pruners.packed import Packed, unpacked

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 40),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    chunk=st.sampled_from((8, 64, 2**24)),
)
def test_there_and_back(
    rows: int,
    columns: int,
    sparsity: float,
    dtype: torch.dtype,
    seed: int,
    chunk: int,
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns).to(dtype)
    weight[torch.rand(rows, columns) < sparsity] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_module, "CHUNK", chunk)
        packed = Packed.of(weight)
        found = packed.weight()
    assert found.dtype == dtype and torch.equal(found, weight)
    left = int(weight.count_nonzero())
    assert packed.nbytes == -(-weight.numel() // 8) + left * weight.element_size()


def test_a_view_and_what_is_not_finite() -> None:
    weight = torch.randn(6, 10)[:, ::2].t()
    weight[0, 0], weight[1, 1], weight[2, 2] = torch.inf, -0.0, 0.0
    assert torch.equal(Packed.of(weight).weight(), weight)


def test_on_an_accelerator_and_home_again() -> None:
    weight = torch.randn(5, 7)
    weight[::2] = 0
    with fake_accelerator():
        there = Packed.of(weight.to("fake:0"))
        assert there.device.type == "fake"
        assert torch.equal(on_host(there.weight()), weight)
        home = there.to(torch.device("cpu"))
        assert torch.equal(home.weight(), weight)
        again = home.to(torch.device("fake:0"))
        assert torch.equal(on_host(again.weight()), weight)


@pytest.mark.parametrize("pack", [False, True])
def test_unpacked(pack: bool) -> None:
    weight = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert torch.equal(unpacked(Packed.of(weight) if pack else weight), weight)
