"""Scripts of integration/benchmarks, which import one another by their bare names."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

__all__ = ["imported"]

BENCHMARKS = Path(__file__).parents[2] / "integration" / "benchmarks"


@contextmanager
def imported(name: str) -> Iterator[ModuleType]:
    """Within the context the script, and those beside it, can be imported."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))
