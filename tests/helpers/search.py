"""Searches whose outcome does not depend on what random weights prefer."""

from dataclasses import replace
from typing import Any

import pytest

from absorb_plugin import method
from absorb_plugin.search.line_search import SearchResult, descent_search

__all__ = ["STEEP", "search_ends_at_uniform"]

# A base allocation that is not uniform, for two blocks.
STEEP = {"allocator": "atp", "allocator_args": {"beta": 0.3}}


def search_ends_at_uniform(patch: pytest.MonkeyPatch) -> None:
    """So that there is something to confirm wherever the base is another."""

    def search(base: Any, budget: Any, *args: Any, **options: Any) -> SearchResult:
        found = descent_search(base, budget, *args, **options)
        return replace(found, sparsity=budget.uniform())

    patch.setattr(method, "descent_search", search)
