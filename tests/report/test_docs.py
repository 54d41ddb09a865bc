"""docs/profile.md against the code: every key that is written, and no other."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import runs, tiny
from helpers.profiles import (
    make_confirmed,
    make_linear_profile,
    make_quality,
)
from helpers.search import STEEP, search_ends_at_uniform

from absorb_plugin.report import profile as report_profile
from absorb_plugin.report.page import USES

PAGE = Path(__file__).parents[2] / "docs" / "profile.md"


def tables() -> dict[str, set[str]]:
    """Heading of a table -> the keys in its first column."""
    text = PAGE.read_text()[PAGE.read_text().index("## profile.json") :]
    found: dict[str, set[str]] = {}
    heading = "profile"
    for line in text.splitlines():
        if (match := re.fullmatch(r"(?:Each of )?`(\w+)`:", line)) is not None:
            heading = match[1]
        elif line.startswith("| `"):
            first = line.split("|")[1]
            found.setdefault(heading, set()).update(re.findall(r"`(\w+)`", first))
    return found


def written(profile: dict[str, Any]) -> dict[str, set[str]]:
    """The same of a profile."""
    blocks = profile["blocks"]
    keys = {"profile": set(profile), "blocks": set().union(*blocks)}
    linears = [linear for block in blocks for linear in block["linears"].values()]
    keys["linears"] = set().union(*linears)
    keys["samples"] = set().union(*profile["samples"])
    for name in ("noise", "search", "confirmed", "quality"):
        keys |= {name: set(profile[name])} if profile[name] else {}
    return keys


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run in which everything is measured."""
    found: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_profile, "draw_profile", lambda profile: b"")
        patch.setattr(
            report_profile, "as_json", lambda profile: found.append(profile) or b""
        )
        search_ends_at_uniform(patch)
        folder = tmp_path_factory.mktemp("report")
        ours = runs.absorption(strength="auto", report_dir=folder, **STEEP)
        model = tiny.make_model("llama", num_hidden_layers=2)
        run = [ours, runs.pruner("sparsegpt")]
        runs.run(model, run, tmp_path_factory.mktemp("run"))
    return found[-1]


def test_every_key_is_documented(profile: dict[str, Any]) -> None:
    documented = tables()
    keys = written(profile)
    assert {"noise", "search", "confirmed"} <= keys.keys()
    for name, found in keys.items():
        # alpha_pruning alone has a metric per Linear
        assert documented[name] - {"metric"} == found, name


def test_the_profiles_of_the_tests_are_as_those_of_runs(
    profile: dict[str, Any],
) -> None:
    made = make_linear_profile(confirmed=make_confirmed(), quality=make_quality())
    for name, found in written(profile).items():
        known = written(made)[name]
        assert known <= found if name == "noise" else known == found, name
    assert written(made)["quality"] == tables()["quality"]


def test_every_use_of_samples_is_told_in_words(profile: dict[str, Any]) -> None:
    uses = {entry["use"] for entry in profile["samples"]}
    assert uses <= USES.keys()
    text = PAGE.read_text()
    assert all(f'"{use}"' in text for use in uses)


def test_settings_are_all_fields(profile: dict[str, Any]) -> None:
    assert profile["settings"].keys() >= {"allocator", "level", "effort", "strength"}
