"""What the docs list, held against the code."""

import re
from pathlib import Path

import pytest

import absorb_plugin
from absorb_plugin.settings import EFFORTS, AllocationSettings
from absorb_plugin.signals import SIGNALS

ROOT = Path(absorb_plugin.__file__).parents[1]
RECIPE = (ROOT / "docs" / "recipe.md").read_text()
OF_EFFORT = {
    "rounds": "rounds",
    "descents": "descents",
    "statistics_samples": "statistics",
    "signal_samples": "signal",
    "search_samples": "search",
    "confirm_samples": "confirm",
    "probe_tokens": "tokens",
}


def rows(text: str) -> list[list[str]]:
    """Cells of the rows of all tables."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_field_is_in_the_table_and_no_other() -> None:
    fields = RECIPE.partition("## signal_args")[0]
    listed = [
        match[1] for row in rows(fields) if (match := re.match(r"`(\w+)`", row[0]))
    ]
    assert listed == list(AllocationSettings.model_fields)


@pytest.mark.parametrize("name", list(AllocationSettings.model_fields))
def test_its_default_is_the_fields(name: str) -> None:
    (row,) = [row for row in rows(RECIPE) if row[0] == f"`{name}`"]
    default = AllocationSettings.model_fields[name].get_default(
        call_default_factory=True
    )
    if name in OF_EFFORT:
        numbers = [str(getattr(one, OF_EFFORT[name])) for one in EFFORTS.values()]
        assert row[2] == "by `effort`: " + ", ".join(numbers)
    elif default is None:
        assert row[2] == "none"
    elif isinstance(default, bool):
        assert row[2] == ("yes" if default else "no")
    else:
        assert row[2].strip("`") == str(default)


def test_every_argument_of_a_signal_is_in_the_table() -> None:
    listed, signal = {}, ""
    for row in rows(RECIPE.partition("## signal_args")[2].partition("## The shape")[0]):
        signal = row[0].strip("`| ") or signal
        if signal in SIGNALS:
            listed[signal, row[1].strip("`")] = row[2].strip("`")
    defaults = {
        (name, argument): str(field.default)
        for name, one in SIGNALS.items()
        for argument, field in one.model_fields.items()
    }
    assert listed == defaults


def test_the_map_of_contributing_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("```\nabsorb_plugin/")[2]
    named = set(re.findall(r"[\w/]+\.py|\w+/", text.partition("```")[0]))
    package = Path(absorb_plugin.__file__).parent
    there = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    there |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert there - named == set()
    files = {path.name for path in package.rglob("*.py")}
    assert {name for name in named if name.endswith(".py")} - files == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def anchors(text: str) -> set[str]:
    """Of the headings, as they are made on the web."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target, anchor in re.findall(
        r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", path.read_text()
    ):
        found = path.parent / target if target else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), (target, anchor)
