"""Cutting the call of a block to some of its samples."""

import pytest
import torch
from torch.nn import Identity

from absorb_plugin.forward.block_io import BlockCall

SAMPLES, TOKENS, HEADS = 4, 5, 2


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


CASES = {
    "mask": (numbered(SAMPLES, 1, TOKENS, TOKENS), 0),
    "positions": (numbered(SAMPLES, TOKENS), 0),
    "of time, height and width": (numbered(3, SAMPLES, TOKENS, 8), 1),
    "shared positions": (numbered(1, TOKENS, 8), None),
    "positions without samples": (numbered(TOKENS, 8), None),
    "one number per sample": (numbered(SAMPLES), None),
    "shared mask": (numbered(1, 1, TOKENS, TOKENS), None),
}


@pytest.mark.parametrize("value, axis", CASES.values(), ids=CASES)
def test_arguments_are_cut_where_they_have_samples(
    value: torch.Tensor, axis: int | None
) -> None:
    hidden = torch.randn(SAMPLES, TOKENS, 8)
    kwargs = {"one": value, "pair": (value, None), "use_cache": False}
    call = BlockCall.of(Identity(), (hidden,), kwargs)
    part = call.of_samples(slice(1, 3))
    expected = value if axis is None else value.narrow(axis, 1, 2)
    assert torch.equal(part.hidden, hidden[1:3])
    assert torch.equal(part.kwargs["one"], expected)
    assert torch.equal(part.kwargs["pair"][0], expected)
    assert part.kwargs["pair"][1] is None and part.kwargs["use_cache"] is False


def test_a_bias_of_every_head_goes_with_its_sample() -> None:
    bias = numbered(SAMPLES * HEADS, 1, TOKENS)
    call = BlockCall.of(Identity(), (torch.randn(SAMPLES, TOKENS, 8), bias), {})
    assert torch.equal(call.of_samples(slice(1, 3)).args[1], bias[HEADS : 3 * HEADS])
