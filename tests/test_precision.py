"""Float32 in the calibrating context, whatever a script has set."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from absorb_plugin.calibration import calibrating
from absorb_plugin.precision import gram, ieee_float32, widest_float

MATMUL = torch.backends.cuda.matmul
ONEDNN = torch.backends.mkldnn.matmul
CONV = torch.backends.cudnn.conv
RNN = torch.backends.cudnn.rnn
BACKENDS = (MATMUL, ONEDNN, CONV, RNN)


def settings() -> list[str]:
    return [x.fp32_precision for x in BACKENDS]


def legacy() -> None:
    torch.set_float32_matmul_precision("high")


def one_backend() -> None:
    MATMUL.fp32_precision = "tf32"


def nothing() -> None:
    pass


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    overall, before = torch.get_float32_matmul_precision(), settings()
    yield
    torch.set_float32_matmul_precision(overall)
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


def mixed() -> None:
    CONV.fp32_precision = "ieee"


@pytest.mark.parametrize("user", [legacy, one_backend, mixed, nothing])
def test_float32_is_float32_while_we_measure(user: Callable[[], None]) -> None:
    user()
    before = settings()
    with calibrating(tiny.make_model("llama")):
        assert settings() == ["ieee"] * 4
        assert torch.get_float32_matmul_precision() == "highest"
        if user is not mixed:  # torch refuses to say, as it did before
            assert not torch.backends.cudnn.allow_tf32
    assert settings() == before
    CONV.fp32_precision = "tf32"
    assert torch.backends.cudnn.allow_tf32


def test_a_full_device_says_nothing_about_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*sizes: int, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    device = torch.device("cpu", 7)  # that no other test asks about
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", full)
        with pytest.raises(torch.OutOfMemoryError):
            widest_float(device)
    assert widest_float(device) == torch.float64


def test_restored_after_an_error() -> None:
    legacy()
    before = settings()
    with pytest.raises(KeyError), ieee_float32():
        raise KeyError
    assert settings() == before
    assert torch.get_float32_matmul_precision() == "high"


def test_sums_of_products_are_float32_whatever_the_units() -> None:
    """By units for 16 bits where they add up in float32: "meta" has such a product."""
    x = torch.randn(300, 8).to(torch.bfloat16)
    exact = x.double().t() @ x.double()
    found = gram(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    there = x.to("meta")
    with Operations() as seen:
        assert gram(there).dtype == torch.float32
    assert "aten.mm.dtype" in seen.names and "aten._to_copy.default" not in seen.names
    for dtype in (torch.float16, torch.float32, torch.float64):
        with Operations() as seen:
            assert gram(x.to(dtype).to("meta")).dtype == torch.float32
        assert "aten.mm.dtype" not in seen.names


@pytest.mark.parametrize("features", [1, 255, 256, 257, 700, 2100])
def test_half_of_the_products_is_the_other_half(features: int) -> None:
    x = torch.randn(9, features)
    found = gram(x)
    torch.testing.assert_close(found, x.t() @ x)
    assert torch.equal(found, found.t())


class Operations(TorchDispatchMode):
    """Names of all that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
