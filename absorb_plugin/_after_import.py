"""Import one module as soon as another one has been imported."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["after_import"]


def after_import(package: str, follower: str) -> None:
    """
    :param package: top-level package; where it has been imported nothing happens
    :param follower: module to import right after it
    """
    if package not in sys.modules:
        sys.meta_path.insert(0, _Finder(package, follower))


class _Finder(MetaPathFinder):
    def __init__(self, package: str, follower: str) -> None:
        self._package, self._follower = package, follower

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name != self._package:
            return None
        sys.meta_path.remove(self)  # once, and the others find it now
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._follower)
        return spec


class _Loader(Loader):
    """Another loader, and an import after it."""

    def __init__(self, loader: Loader, follower: str) -> None:
        self._loader, self._follower = loader, follower

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # what the module and its readers (data files) see is its own loader
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        import_module(self._follower)
