"""Who may import whom: the rings of the package, read from its syntax trees."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import absorb_plugin
from absorb_plugin.cli.app import app

PACKAGE = Path(absorb_plugin.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# From the outermost ring to the innermost. A file imports from its own ring and from
# those after it. A name is a folder or a file of the package.
RINGS = [
    {"__init__", "_after_import"},
    {"cli"},
    {"report", "evaluation", "modifier"},
    {"allocate"},
    {"method"},
    {"allocation", "choices", "measuring"},
    {"allocators.base_allocation", "allocators.grams", "signals", "judges"},
    {"pruners"},
    {"forward"},
    {"cache", "sample_split"},
    {"settings"},
    {"limits"},
    {"fingerprint", "groups", "blocks", "calibration", "devices"},
    {"batches", "language_model"},
    {"plugins"},
    {"allocators"},
    {"hookspecs"},
    {"search"},
    {"files", "mistakes", "overflow", "distributed", "cpu", "precision", "torch_state"}
    | {"_llmcompressor", "other_modifiers", "names", "compressed"},
]


def module_of(path: Path) -> str:
    """`search.budget`, `forward`, `allocate`; `__init__` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def room_of(path: Path) -> str:
    return module_of(path).split(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports when it runs, also within functions."""
    yield from _imported(ast.parse(path.read_text()))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                yield from _imported(other)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or "." * node.level
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        else:
            yield from _imported(node)


def reached(path: Path, name: str) -> bool:
    return any(found == name or found.startswith(f"{name}.") for found in imports(path))


every_file = pytest.mark.parametrize("path", FILES, ids=module_of)


def ring_of(name: str) -> int:
    """The ring of a module; the most particular entry of RINGS counts."""
    found = [
        (len(entry), number)
        for number, ring in enumerate(RINGS)
        for entry in ring
        if name == entry or name.startswith(f"{entry}.")
    ]
    assert found, f"{name} is in no ring: add it to RINGS"
    return max(found)[1]


def own_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    modules = {module_of(other) for other in FILES}
    names = {n.removeprefix("absorb_plugin.") for n in imports(path)}
    found = names & modules
    if any(name in names for name in absorb_plugin.__all__):
        found.add("modifier")  # where the public names come from
    # a package that is named for one of its files is not meant itself
    named = {n for n in found if not any(o.startswith(f"{n}.") for o in found)}
    return named - {"__init__"}


@every_file
def test_rings(path: Path) -> None:
    own = ring_of(module_of(path))
    outwards = {name for name in own_imports(path) if ring_of(name) < own}
    assert not outwards


def test_nothing_runs_in_a_circle() -> None:
    """Also where an import waits within a function."""
    graph = {module_of(path): own_imports(path) for path in FILES}
    while True:
        # a package is made of its files
        ends = {name for name, others in graph.items() if not others - {name}}
        if not ends:
            break
        graph = {n: others - ends for n, others in graph.items() if n not in ends}
    assert not graph


def test_the_search_is_numpy_alone() -> None:
    for path in FILES:
        if room_of(path) == "search":
            found = {name.split(".")[0] for name in imports(path)}
            assert not found & {"torch", "llmcompressor", "transformers", "loguru"}


# What recipes and scripts of llm-compressor use themselves.
PUBLIC = re.compile(
    r"llmcompressor(\.(core|modifiers|modifiers\.pruning|recipe))?(\.[A-Za-z]*)?$"
)
PRIVATE = {
    "_hessians",
    "_module_names",
    "_module_sparsities",
    "_num_samples",
    "_row_scalars",
    "_target_layers",
}


@every_file
def test_private_names_of_llm_compressor_have_their_rooms(path: Path) -> None:
    # calibration and devices: the context of llm-compressor's own passes
    if room_of(path) in {"pruners", "calibration", "devices", "_llmcompressor"}:
        return
    names = [n for n in imports(path) if n.split(".")[0] == "llmcompressor"]
    assert all(PUBLIC.match(name) for name in names), names
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert not used & PRIVATE


def strings(path: Path) -> Iterator[str]:
    """String constants of a file, without docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [x for x in body if not _is_text(x)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


@functools.cache
def our_options() -> set[str]:
    """Of all commands, also those that typer names after a parameter."""
    commands = typer.main.get_command(app).commands.values()
    parameters = [parameter for one in commands for parameter in one.params]
    names = [name for one in parameters for name in (*one.opts, *one.secondary_opts)]
    return {name for name in names if OPTION.fullmatch(name)}


@every_file
def test_the_command_line_is_in_cli_alone(path: Path) -> None:
    if room_of(path) == "cli":
        return
    assert not reached(path, "rich") and not reached(path, "typer")
    assert our_options() > {"--figure", "--sparsegpt", "--no-sparsegpt", "--json"}
    # a line for vLLM's own command line
    told = [text for text in strings(path) if not text.startswith(" --dtype")]
    named = {option for text in told for option in OPTION.findall(text)}
    assert not named & our_options()


@every_file
def test_figures_are_drawn_in_report_alone(path: Path) -> None:
    assert room_of(path) == "report" or not reached(path, "matplotlib")
