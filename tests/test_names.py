"""The names that recipes and commands take are those that there are."""

from typing import Any, get_args

import pytest

from absorb_plugin import names
from absorb_plugin.evaluation.recipes import QUANTIZATIONS
from absorb_plugin.groups import LEVELS
from absorb_plugin.pruners import PRUNERS
from absorb_plugin.settings import EFFORTS


@pytest.mark.parametrize(
    "literal, there",
    [
        (names.EffortName, EFFORTS),
        (names.PrunerName, PRUNERS),
        (names.Quantization, QUANTIZATIONS),
        (names.Level, ("auto", *LEVELS)),
    ],
)
def test_names_are_those_of_the_registry(literal: Any, there: Any) -> None:
    assert get_args(literal) == tuple(there)
