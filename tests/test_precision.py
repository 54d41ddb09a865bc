"""Float32 in the calibrating context, whatever a script has set."""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import tiny

from absorb_plugin.calibration import calibrating
from absorb_plugin.precision import ieee_float32

MATMUL = torch.backends.cuda.matmul
ONEDNN = torch.backends.mkldnn.matmul
CONV = torch.backends.cudnn.conv


def settings() -> list[str]:
    return [x.fp32_precision for x in (MATMUL, ONEDNN, CONV)]


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
    for backend, precision in zip((MATMUL, ONEDNN, CONV), before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.parametrize("user", [legacy, one_backend, nothing])
def test_float32_is_float32_while_we_measure(user: Callable[[], None]) -> None:
    user()
    before = settings()
    with calibrating(tiny.make_model("llama")):
        assert settings() == ["ieee"] * 3
        assert torch.get_float32_matmul_precision() == "highest"
    assert settings() == before


def test_restored_after_an_error() -> None:
    legacy()
    before = settings()
    with pytest.raises(KeyError), ieee_float32():
        raise KeyError
    assert settings() == before
    assert torch.get_float32_matmul_precision() == "high"
