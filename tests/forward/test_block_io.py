"""Cutting the call of a block to some of its samples."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import Identity

from absorb_plugin.forward.block_io import BlockCall
from absorb_plugin.forward.parts import Parts

SAMPLES, TOKENS = 4, 5


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


@pytest.mark.parametrize("order", ["bias, x", "x, bias", "named"])
def test_the_hidden_state_by_its_name(order: str) -> None:
    """Where there are several tensors of three dimensions."""

    class First(torch.nn.Module):
        def forward(self, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return x

    class Second(torch.nn.Module):
        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return x

    x, bias = torch.zeros(2, 5, 8), torch.ones(2, 5, 5)
    if order == "bias, x":
        call = BlockCall.of(First(), (bias, x), {})
    elif order == "x, bias":
        call = BlockCall.of(Second(), (x, bias), {})
    else:
        call = BlockCall.of(First(), (bias,), {"x": x})
    assert call.hidden is x


@pytest.mark.parametrize("value, axis", CASES.values(), ids=CASES)
def test_arguments_are_cut_where_they_have_samples(
    value: torch.Tensor, axis: int | None
) -> None:
    hidden = torch.randn(SAMPLES, TOKENS, 8)
    kwargs = {"one": value, "pair": (value, None), "use_cache": False}
    call = BlockCall.of(Identity(), (hidden,), kwargs)
    part = call.of_samples(slice(1, 3), Identity())
    expected = value if axis is None else value.narrow(axis, 1, 2)
    assert torch.equal(part.hidden, hidden[1:3])
    assert torch.equal(part.kwargs["one"], expected)
    assert torch.equal(part.kwargs["pair"][0], expected)
    assert part.kwargs["pair"][1] is None and part.kwargs["use_cache"] is False


BIASES = {
    "one for every sample": (2, lambda x: x[2:6], (2 * SAMPLES, 1, TOKENS)),
    "one for all": (SAMPLES, lambda x: x, (SAMPLES, 1, TOKENS)),
    "one of every pair": (2 * SAMPLES, lambda x: x, (2 * SAMPLES, TOKENS, TOKENS)),
}


class Biased(Identity):
    """
    A block as BLOOM and MPT have them.

    :param heads: of its attention
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads

    def forward(
        self, hidden_states: torch.Tensor, alibi: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise NotImplementedError  # no test runs it


@pytest.mark.parametrize("heads, expected, shape", BIASES.values(), ids=BIASES)
def test_a_bias_of_every_head(heads: int, expected: Callable, shape: tuple) -> None:
    block, bias, hidden = Biased(heads), numbered(*shape), torch.randn(SAMPLES, 5, 8)
    by_place = BlockCall.of(block, (hidden, bias), {})
    by_name = BlockCall.of(block, (hidden,), {"alibi": bias})
    part = slice(1, 3)
    assert torch.equal(by_place.of_samples(part, block).args[1], expected(bias))
    assert torch.equal(by_name.of_samples(part, block).kwargs["alibi"], expected(bias))


def test_names_are_known_where_blocks_run_in_parts() -> None:
    """Their forward is another one then."""
    seen = []

    class Block(Biased):
        def forward(
            self, hidden_states: torch.Tensor, alibi: torch.Tensor | None = None
        ) -> torch.Tensor:
            assert alibi is not None
            seen.append(alibi)
            return hidden_states

    block, bias = Block(SAMPLES), numbered(SAMPLES, 1, TOKENS)
    with Parts(1).applied([block]):
        block(torch.randn(SAMPLES, TOKENS, 8), bias)
    assert len(seen) == SAMPLES and all(torch.equal(one, bias) for one in seen)


def test_a_bias_that_is_a_number() -> None:
    block = Biased(2)
    call = BlockCall.of(block, (torch.randn(SAMPLES, 5, 8), torch.tensor(1.0)), {})
    assert call.of_samples(slice(1, 3), block).args[1] == 1.0


def test_as_many_samples_as_heads() -> None:
    """What has the shape of MPT's bias then, and is none: it is cut all the same."""
    block, square = Biased(SAMPLES), torch.randn(SAMPLES, TOKENS, TOKENS)
    kwargs = {"position_embeddings": (square, square), "per_token": square}
    part = BlockCall.of(block, (square,), kwargs).of_samples(slice(1, 3), block)
    assert torch.equal(part.hidden, square[1:3])
    assert torch.equal(part.kwargs["position_embeddings"][1], square[1:3])
    assert torch.equal(part.kwargs["per_token"], square[1:3])
