"""What is said of an error on one rank, when telling the others fails as well."""

from typing import NoReturn

import pytest
from loguru import logger

from absorb_plugin import distributed


def broken(item: object) -> NoReturn:
    raise ConnectionError("the process group has gone")


def test_the_first_error_is_raised_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    monkeypatch.setattr(distributed, "gather", broken)
    said: list[str] = []
    sink = logger.add(said.append, level="ERROR", format="{message}")
    with pytest.raises(ArithmeticError, match="mine"), distributed.fail_together():
        raise ArithmeticError("mine")
    logger.remove(sink)
    assert "rank 3" in said[0] and "mine" in said[0]


def test_what_the_process_group_says_alone_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "gather", broken)
    with pytest.raises(ConnectionError), distributed.fail_together():
        pass
