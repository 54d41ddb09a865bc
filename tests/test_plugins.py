"""The plugin manager, with throwaway plugins and a throwaway distribution."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import runs, tiny
from helpers.cli import absorb
from helpers.plugins import registered
from pydantic import Field, field_validator

from absorb_plugin import plugins
from absorb_plugin.allocators import (
    Allocator,
    BaseAllocation,
    LinearGroup,
    LinearStatistics,
)
from absorb_plugin.allocators.grams import GramProbe
from absorb_plugin.blocks import find_blocks
from absorb_plugin.forward.run import run_probes
from absorb_plugin.hookspecs import hookimpl
from absorb_plugin.plugins import (
    PluginError,
    allocators,
    build_allocator,
    manager,
    run_allocator,
    run_measure,
)

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "allocators.md"
BUILTINS = ["uniform", "owl", "alpha_pruning", "dlp", "lsa", "atp"]


class Outsider(Allocator):
    name: ClassVar[str] = "outsider"
    answer: Any = Field(default=None)
    steps: int = 3

    def allocate(self, groups: Any, sparsity: float) -> BaseAllocation:
        return self.answer() if callable(self.answer) else self.answer


class Demanding(Allocator):
    name: ClassVar[str] = "demanding"
    floor: float
    parts: list[int] = Field(default_factory=list)


def groups(count: int = 2) -> list[LinearGroup]:
    return [
        LinearGroup(
            f"layers.{index}",
            {"up": LinearStatistics(torch.nn.Linear(4, 4, bias=False))},
            16,
        )
        for index in range(count)
    ]


# --- registration -----------------------------------------------------------------


def test_arguments_without_a_default_are_listed() -> None:
    with registered(Demanding):
        (entry,) = [one for one in plugins.listing() if one["name"] == "demanding"]
    assert json.loads(json.dumps(entry))["arguments"] == {"floor": None, "parts": []}
    assert entry["required"] == ["floor"]


class Kind(Enum):
    mean = "mean"


class Bracketed(Allocator):
    name: ClassVar[str] = "brack[red]eted"
    paper: ClassVar[str] = "https://example.org/[/x]"
    cost: ClassVar[str] = "one forward [/per block]"
    level: int
    kind: Kind = Kind.mean
    limit: float = float("inf")
    folder: Path = Path("some[/where]")
    made: object = Field(default_factory=lambda others: others["limit"])


def test_arguments_of_any_type_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with registered(Bracketed):
        listed, table = absorb("allocators", "--json"), absorb("allocators")
    assert listed.exit_code == table.exit_code == 0, (listed.output, table.output)
    entry = json.loads(listed.stdout, parse_constant=pytest.fail)[-1]
    assert entry["arguments"] == {
        "level": None,
        "kind": "mean",
        "limit": "inf",
        "folder": "some[/where]",
        "made": "(made of the others)",
    }
    for told in (Bracketed.name, Bracketed.paper, Bracketed.cost, "level (required)"):
        assert told in table.stdout
    assert "kind=mean, limit=inf, folder=some[/where]" in table.stdout


class Broken(Allocator):
    name: ClassVar[str] = "broken"
    x: float = Field(default_factory=lambda: 1 / 0)
    y: float = 1.0

    @field_validator("y")
    @classmethod
    def validate_y(cls, value: float) -> float:
        return [1.0, 2.0][int(value)]


def test_a_default_that_cannot_be_made() -> None:
    """It is listed, and so are all the others."""
    with registered(Broken):
        listed, table = absorb("allocators", "--json"), absorb("allocators")
    assert listed.exit_code == table.exit_code == 0, (listed.output, table.output)
    entry = json.loads(listed.stdout)[-1]
    remark = "(cannot be made: ZeroDivisionError('division by zero'))"
    assert entry["arguments"] == {"x": remark, "y": 1.0}


@pytest.mark.parametrize(
    ("arguments", "kind"), [({}, "ZeroDivision"), ({"x": 1, "y": 7}, "Index")]
)
def test_what_is_raised_while_it_is_built(arguments: dict[str, Any], kind: str) -> None:
    message = rf"'broken' of .*'throwaway'.* failed with the arguments .*{kind}Error"
    with registered(Broken), pytest.raises(PluginError, match=message):
        build_allocator("broken", arguments)
    # nor does it hide what is wrong with an argument
    with registered(Broken), pytest.raises(ValueError, match="z=1 is no argument"):
        build_allocator("broken", {"x": 1, "z": 1})


def test_builtins_come_first_and_name_their_distribution() -> None:
    found = allocators()
    assert list(found)[:6] == BUILTINS
    for name in BUILTINS:
        assert found[name].plugin == "absorb_plugin"
        assert found[name].distribution.startswith("absorb-plugin ")
        assert found[name].allocator.name == name


def test_register_and_unregister() -> None:
    assert "outsider" not in allocators()
    with registered(Outsider):
        entry = allocators()["outsider"]
        assert entry.allocator is Outsider
        assert entry.plugin == "throwaway"
        assert isinstance(build_allocator("outsider", {}), Outsider)
    assert "outsider" not in allocators()


def test_two_allocators_with_one_name_name_both_plugins() -> None:
    class Owl(Allocator):
        name: ClassVar[str] = "owl"

    with (
        registered(Owl),
        pytest.raises(PluginError, match="'owl'") as caught,
    ):
        allocators()
    assert "'absorb_plugin' (absorb-plugin " in str(caught.value)
    assert "'throwaway' (no distribution" in str(caught.value)


@pytest.mark.parametrize("thing", [int, Outsider(), "owl"], ids=str)
def test_registering_what_is_no_allocator(thing: object) -> None:
    with (
        registered(thing),
        pytest.raises(PluginError, match="'throwaway'.*no subclass of Allocator"),
    ):
        allocators()


def test_registering_an_allocator_without_a_name() -> None:
    class Nameless(Allocator):
        pass

    with (
        registered(Nameless),
        pytest.raises(PluginError, match="'throwaway'.*Nameless without a `name"),
    ):
        allocators()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"needs": "everything"}, "needs='everything': choose one of .*'gram'"),
        ({"needs": ["weights"]}, "needs=.'weights'.: choose one of"),
        ({"granularities": "block"}, "granularities='block': give a tuple"),
        ({"granularities": ()}, "granularities=.*: give a tuple"),
        ({"granularities": ("block", "row")}, r".*\('block', 'row'\): give a tuple"),
        ({"granularities": None}, "granularities=None: give a tuple"),
        ({"cost": None}, "cost=None: give a text"),
        ({"paper": 2305}, "paper=2305: give a text"),
    ],
)
def test_an_allocator_that_wants_what_there_is_not(
    wrong: dict[str, Any], message: str
) -> None:
    """It cannot be built, and is in nobody else's way."""
    odd = type("Odd", (Allocator,), {"name": "odd", **wrong})
    with registered(odd):
        assert build_allocator("owl", {}).name == "owl"
        with pytest.raises(PluginError, match=f"'odd' of .*'throwaway'.*{message}"):
            build_allocator("odd", {})
        (entry,) = [one for one in plugins.listing() if one["name"] == "odd"]
        assert absorb("allocators").exit_code == 0
    (key,) = wrong
    assert re.search(rf"^\({message}.*\)$", entry[key]), entry


@pytest.mark.parametrize("kind", [list, set, frozenset])
def test_granularities_of_another_kind(kind: type) -> None:
    odd = type("Odd", (Allocator,), {"name": "odd"})
    odd.granularities = kind(["linear", "block"])  # type: ignore
    with registered(odd):
        assert build_allocator("odd", {}).name == "odd"
        (entry,) = [one for one in plugins.listing() if one["name"] == "odd"]
    assert entry["granularities"] == ["block", "linear"]


def test_a_hook_that_raises_names_its_plugin() -> None:
    class Plugin:
        @hookimpl
        def register_allocators(self) -> list[type[Allocator]]:
            raise OSError("no such table")

    manager().register(Plugin(), name="throwaway")
    try:
        with pytest.raises(PluginError, match="'throwaway'.*no such table") as caught:
            allocators()
        assert isinstance(caught.value.__cause__, OSError)
    finally:
        manager().unregister(name="throwaway")


def test_observers_see_a_finished_allocation() -> None:
    seen = []

    class Plugin:
        @hookimpl
        def allocation_finished(self, profile: dict[str, Any]) -> None:
            seen.append(profile)

    manager().register(Plugin(), name="observer")
    try:
        manager().hook.allocation_finished(profile={"allocator": "owl"})
    finally:
        manager().unregister(name="observer")
    assert seen == [{"allocator": "owl"}]


# --- building ---------------------------------------------------------------------


def test_build() -> None:
    assert build_allocator("owl", {"m": 7}).model_dump() == {"m": 7.0, "lmbda": 0.08}


def test_unknown_name_lists_the_others() -> None:
    with pytest.raises(
        ValueError, match="'owll' is unknown.*atp, dlp, lsa, owl, uniform"
    ):
        build_allocator("owll", {})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("owl", {"m": -1}, "'owl': m=-1: .*greater than 0.*m=5.0, lmbda=0.08"),
        ("owl", {"lambda": 1}, "'owl': lambda=1 is no.* mean 'lmbda'"),
        ("uniform", {"x": 1}, "'uniform': x=1 is no argument of it. It takes none"),
        ("alpha_pruning", {"variant": "top"}, "variant='top': .*'peak' or 'mid'"),
        ("demanding", {}, "'demanding': floor is required. It takes floor .required."),
    ],
)
def test_bad_arguments_name_field_value_and_remedy(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with registered(Demanding), pytest.raises(ValueError, match=message):
        build_allocator(name, arguments)


# --- running ----------------------------------------------------------------------


def answer(metric: Any = (1.0, 2.0), sparsity: Any = (0.4, 0.6), **more: Any) -> Any:
    return BaseAllocation(metric, sparsity, **more)


def raising() -> None:
    raise ZeroDivisionError("in the outsider")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (answer(sparsity=(0.4, 0.6, 0.5)), r"sparsity of shape \(3,\) for 2 groups"),
        (answer(metric=(1.0,)), r"metric of shape \(1,\) for 2 groups"),
        (answer(sparsity=0.5), r"sparsity of shape \(\) for 2 groups"),
        (answer(sparsity=(0.4, float("nan"))), "sparsity=nan for layers.1"),
        (answer(metric=(float("inf"), 1.0)), "metric=inf for layers.0"),
        (answer(sparsity=(-0.1, 0.6)), r"outside \[0, 1\] for layers.0: -0.1"),
        (answer(sparsity=(0.1, 1.1)), r"outside \[0, 1\] for layers.1: 1.1"),
        (answer(sparsity=("a", "b")), "sparsity that is no array of numbers"),
        (answer(linear_metrics=({"up": 1.0},)), "linear_metrics of length 1"),
        (answer(linear_metrics=({"up": 1.0}, {"q": 1.0})), "q=1.0 for layers.1"),
        (
            answer(linear_metrics=({"up": float("nan")}, {"up": 1.0})),
            "up=nan for layers.0",
        ),
        (answer(linear_metrics=({"up": 10**400}, {"up": 1.0})), "up=10+ for layers.0"),
        (answer(metric=(10**400, 1.0)), "metric that is no array of numbers"),
        (answer(linear_metrics=({"up": None}, {"up": 1.0})), "up=None for layers.0"),
        (answer(linear_metrics=({"up": "a"}, {"up": 1.0})), "up=a for layers.0"),
        (answer(linear_metrics=None), "linear_metrics=None: give a list"),
        (answer(linear_metrics=(1.0, 2.0)), r"linear_metrics=\(1.0, 2.0\): give"),
        (answer(metric=(None, 1.0)), "metric=nan for layers.0"),
        (answer(metric=None), r"metric of shape \(\) for 2 groups"),
        ([0.4, 0.6], "list, not a BaseAllocation"),
        (raising, "failed in allocate: ZeroDivisionError.*in the outsider"),
    ],
)
def test_a_broken_answer_names_allocator_plugin_and_distribution(
    result: Any, message: str
) -> None:
    with registered(Outsider), pytest.raises(PluginError, match=message) as caught:
        run_allocator(Outsider(answer=result), groups(), 0.5)
    assert str(caught.value).startswith(
        "allocator 'outsider' of plugin 'throwaway' (no distribution"
    )
    if result is raising:
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


class Measuring(Outsider):
    needs: ClassVar = "gram"

    def measure(self, weight: torch.Tensor, gram: torch.Tensor) -> float:
        return self.answer() if callable(self.answer) else self.answer


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (raising, "failed in measure, of layers.0.up: ZeroDivisionError.*outsider"),
        ("a", "returned 'a' from measure for layers.0.up; a finite number"),
        (None, "returned None from measure"),
        (float("nan"), "returned nan from measure"),
        (torch.ones(2), "returned tensor.* from measure"),
    ],
)
def test_a_measure_that_breaks_names_allocator_plugin_and_linear(
    number: Any, message: str
) -> None:
    asked = ("layers.0.up", torch.ones(1, 1), torch.ones(1, 1))
    with registered(Measuring), pytest.raises(PluginError, match=message) as caught:
        run_measure(Measuring(answer=number), *asked)
    assert str(caught.value).startswith("allocator 'outsider' of plugin 'throwaway'")


def test_every_linear_gets_its_own_moments() -> None:
    """Queries, keys and values have one input; what is done to it stays with one."""
    seen: dict[str, list[torch.Tensor]] = {}

    class Dampening(Measuring):
        def measure(self, weight: torch.Tensor, gram: torch.Tensor) -> float:
            seen.setdefault(str(len(gram)), []).append(gram.clone())
            gram.diagonal().add_(gram.diagonal().mean())
            return float(gram.trace())

    model = tiny.small()
    blocks = find_blocks(model)
    probe = GramProbe(blocks, Dampening())
    run_probes(model, blocks, [tiny.make_batch(4)], [probe])
    first, second, third = seen["32"][:3]  # q, k, v
    assert torch.equal(first, second) and torch.equal(first, third)
    assert not torch.equal(first, seen["32"][3])  # o has another input


def test_numbers_that_are_measured() -> None:
    asked = ("layers.0.up", torch.ones(1, 1), torch.ones(1, 1))
    for number in (2, 2.0, np.float32(2), torch.tensor(2.0)):
        found = run_measure(Measuring(answer=number), *asked)
        assert type(found) is float and found == 2.0

    def full() -> None:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):  # smaller batches are tried then
        run_measure(Measuring(answer=full), *asked)


def test_an_allocation_asks_for_measures_by_name() -> None:
    broken = {"allocator": "outsider", "allocator_args": {"answer": "a"}}
    with registered(Measuring), pytest.raises(PluginError, match="layers.0.self_attn"):
        runs.allocate(tiny.small(), strength=0, **broken)


def test_a_good_answer_is_handed_over_as_arrays() -> None:
    linear_metrics = ({"up": 1.0}, {"up": 2.0})
    mine = answer(sparsity=[0, 1], linear_metrics=linear_metrics)
    with registered(Outsider):
        result = run_allocator(Outsider(answer=mine), groups(), 0.5)
    assert result.metric.dtype == result.sparsity.dtype == np.float64
    assert result.sparsity.tolist() == [0.0, 1.0]
    assert result.linear_metrics == linear_metrics


def test_an_unregistered_allocator_is_named_by_its_module() -> None:
    with pytest.raises(PluginError, match=rf"'outsider' \({__name__}, not registered"):
        run_allocator(Outsider(), groups(), 0.5)


def test_nothing_to_allocate() -> None:
    with pytest.raises(ValueError, match="no prunable Linear"):
        run_allocator(build_allocator("uniform", {}), [], 0.5)


# --- entry points -----------------------------------------------------------------


@pytest.fixture
def loaded_from(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., None]]:
    """Give the manager entry points (name, distribution, load), and load afresh."""

    def install(*points: tuple[str, str, Callable[[], Any]]) -> None:
        made = [
            SimpleNamespace(
                name=name,
                value=f"{name}_module",
                dist=SimpleNamespace(name=dist, version="2.0"),
                load=load,
            )
            for name, dist, load in points
        ]
        monkeypatch.setattr(plugins, "entry_points", lambda group: made)
        plugins._load.cache_clear()

    yield install
    plugins._load.cache_clear()


def plugin_with(*classes: type[Allocator]) -> Any:
    return SimpleNamespace(register_allocators=hookimpl(lambda: list(classes)))


def test_an_entry_point_that_fails_to_import(loaded_from: Callable[..., None]) -> None:
    def load() -> None:
        raise ModuleNotFoundError("No module named 'jax'")

    loaded_from(("jolly", "jolly-allocators", load))
    for _ in range(2):  # and again: a failure is not remembered as success
        with pytest.raises(PluginError, match="No module named 'jax'") as caught:
            allocators()
        assert "plugin 'jolly' of jolly-allocators 2.0" in str(caught.value)
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_an_entry_point_with_a_hook_nobody_calls(
    loaded_from: Callable[..., None],
) -> None:
    misspelt = SimpleNamespace(register_alocators=hookimpl(lambda: [Outsider]))
    loaded_from(("jolly", "jolly-allocators", lambda: misspelt))
    with pytest.raises(PluginError, match="jolly-allocators 2.0.*register_alocators"):
        allocators()


def test_two_distributions_with_one_allocator(
    loaded_from: Callable[..., None],
) -> None:
    class Twin(Allocator):
        name: ClassVar[str] = "outsider"

    loaded_from(
        ("first", "one", lambda: plugin_with(Outsider)),
        ("second", "two", lambda: plugin_with(Twin)),
    )
    with pytest.raises(PluginError) as caught:
        allocators()
    for part in ("'outsider'", "'first' (one 2.0)", "'second' (two 2.0)"):
        assert part in str(caught.value)


def test_two_distributions_with_one_entry_point_name(
    loaded_from: Callable[..., None],
) -> None:
    loaded_from(
        ("same", "one", lambda: plugin_with(Outsider)),
        ("same", "two", lambda: plugin_with(Demanding)),
    )
    found = allocators()
    assert found["outsider"].distribution == "one 2.0"
    assert found["demanding"].distribution == "two 2.0"


def test_entry_points_are_loaded_once(loaded_from: Callable[..., None]) -> None:
    loads = []

    def load() -> Any:
        loads.append(1)
        return plugin_with(Outsider)

    loaded_from(("jolly", "jolly-allocators", load))
    assert allocators()["outsider"] == allocators()["outsider"]
    assert manager() is manager()
    assert len(loads) == 1


# --- a distribution of its own, as the documentation tells it ---------------------

CHECK = """
import sys
from pathlib import Path
from helpers import runs
from helpers import tiny
import torch
from llmcompressor.core import active_session
from absorb_plugin import plugins
from absorb_plugin.allocators import LinearGroup, LinearStatistics
from absorb_plugin.plugins import allocators, build_allocator, run_allocator

entry = allocators()["weight_norm"]
print(entry.plugin, "|", entry.distribution)
groups = []
for index in range(3):
    linear = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.constant_(linear.weight, index + 1.0)
    groups.append(LinearGroup(str(index), {"up": LinearStatistics(linear)}, 16))
allocator = build_allocator("weight_norm", {"width": 0.2})
result = run_allocator(allocator, groups, 0.5)
print(*result.metric.tolist(), "|", *(round(s, 6) for s in result.sparsity.tolist()))

folder = Path(sys.argv[2])  # a recipe that names it, through oneshot
model = tiny.make_model("llama", num_hidden_layers=2)
with torch.no_grad():
    for parameter in model.model.layers[1].parameters():
        parameter.mul_(2)
runs.run(model, str(folder / "recipe.yaml"), folder, samples=2)
(pruner,) = active_session().lifecycle.recipe.modifiers
zeros = [(layer.mlp.up_proj.weight == 0).float().mean() for layer in model.model.layers]
print(*pruner.sparsity, "|", *(float(share) for share in zeros))

sys.path.append(sys.argv[1])  # the same allocator from a second distribution
plugins._load.cache_clear()
try:
    allocators()
except plugins.PluginError as error:
    print(error)
"""

RECIPE = """
test_stage:
  test_modifiers:
    AbsorptionAllocationModifier:
      allocator: weight_norm
      allocator_args: {width: 0.25}
      strength: 0  # the base allocation and no more
    WandaPruningModifier:
      sparsity: 0.5
      targets: ["LlamaDecoderLayer"]
"""


def code_block(language: str, first: str) -> str:
    for block in re.findall(rf"```{language}\n(.*?)```", DOC.read_text(), re.S):
        if first in block.splitlines()[0]:
            return block
    raise AssertionError(f"no {language} block that begins with {first} in {DOC}")


def test_the_documented_allocator_installed_from_its_own_distribution(
    tmp_path: Path,
) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    module = code_block("python", "absorb_weightnorm.py")
    (source / "absorb_weightnorm.py").write_text(module)
    (source / "pyproject.toml").write_text(code_block("toml", "pyproject.toml"))
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options]
        + ["--disable-pip-version-check", "--target", str(site), str(source)],
        check=True,
        timeout=120,
    )
    other = tmp_path / "other" / "copycat-1.5.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Name: copycat\nVersion: 1.5\n")
    (other / "entry_points.txt").write_text("[absorb_plugin]\ncopycat = copycat\n")
    (other.parent / "copycat.py").write_text(module)

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    path = [str(site), str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(other.parent), str(tmp_path)],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(path)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # among others: llm-compressor logs to stdout
    lines = done.stdout.splitlines()
    assert "weightnorm | absorb-weightnorm 0.1" in lines
    assert "1.0 2.0 3.0 | 0.7 0.5 0.3" in lines
    # the block of larger weights is pruned less; the second pair was counted
    assert "0.75 0.25 | 0.75 0.25" in lines
    clash = lines[-1]
    for part in (
        "two allocators are called 'weight_norm'",
        "'weightnorm' (absorb-weightnorm 0.1)",
        "'copycat' (copycat 1.5)",
    ):
        assert part in clash
    lines = [line for line in module.splitlines() if line.strip()]
    assert len(lines) <= 45, "the documentation promises about 40 lines"


@pytest.mark.parametrize("name", BUILTINS)
def test_the_documented_defaults(name: str) -> None:
    """The second table: one row per allocator, with all its arguments."""
    _, row = re.findall(rf"^\| `{name}` \|.*$", DOC.read_text(), re.M)
    for key, field in allocators()[name].allocator.model_fields.items():
        assert f"`{key}: {field.default}`" in row


def test_the_documented_observer_runs(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    exec(code_block("python", "from absorb_plugin.hookspecs"), namespace)
    observer = SimpleNamespace(allocation_finished=namespace["allocation_finished"])
    manager().register(observer, name="observer")
    try:
        profile = {"settings": {"allocator": "owl"}, "achieved": 0.5}
        manager().hook.allocation_finished(profile=profile)
    finally:
        manager().unregister(name="observer")
    assert capsys.readouterr().out == "owl 0.5\n"
