"""What a reader is told of before he trusts the numbers."""

import re
from typing import Any

import pytest
from helpers.profiles import (
    KINDS,
    make_confirmed,
    make_descent,
    make_linear_profile,
    make_profile,
    make_search,
)

from absorb_plugin.report.warnings import find_warnings

ZERO = [{"direction": [], "strengths": [0.0], "losses": [4.5], "chosen": 0.0}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": {"allocator": "owl", "strength": 0, "max_sparsity": 0.9}},
            "strength is 0 in the recipe: this is owl alone",
        ),
        (
            {"search": make_search(rounds=ZERO)},
            "The base allocation was kept: no correction beat it",
        ),
        (
            {"search": make_search(start="uniform", uniform_loss=4.4)},
            r"Uniform beat owl .*\(4\.400 against 4\.500 nats\).* uniform\.$",
        ),
        (
            {"search": make_search(start="uniform", base_loss=None)},
            r"Uniform beat owl .*\(4\.600 against overflow nats\)",
        ),
        (
            {"search": make_search(start="uniform", rounds=ZERO)},
            "nothing beat it: this is a uniform allocation",
        ),
        (
            {"confirmed": make_confirmed() | {"anew": True}},
            "clearly preferred another start .* did better started from owl",
        ),
        (
            {"confirmed": make_confirmed("base", base=4.4, searched=4.5)},
            r"^Judged by SparseGPT.* did not hold \(nats: base 4\.400, uniform 4\.500, "
            r"searched 4\.500\), so the allocation is that of owl alone\.$",
        ),
        (
            {"confirmed": make_confirmed("halfway", halfway=4.3)},
            r"halfway to what the search had found\.$",
        ),
        ({"confirmed": make_confirmed("uniform", base=4.6)}, "so .* is uniform"),
        (
            {"confirmed": make_confirmed(base=4.26)},
            r"The gain, 0\.01 ± 0\.03 nats per token, is within its standard error",
        ),
        (
            {"noise": {"magnitude": 0.01, "floor": [1e-3, 3e-3]}},
            r"η = 0\.01, is less than 5 times the rounding floor of 3\.0e-03",
        ),
        (
            {"settings": {"allocator": "owl", "strength": 1, "max_sparsity": 0.595}},
            r"At the cap, max_sparsity 0\.595: model\.layers\.",
        ),
        ({"realised": None}, "before pruning was finished"),
        ({"realised": 0.4}, r"0\.4000 of the weights are zero, 0\.5000 were asked for"),
        ({"zeros_lost": 0.125}, r"12\.50% of the zeros .* by a later modifier"),
    ],
)
def test_each_warning_alone(changes: dict[str, Any], message: str) -> None:
    assert find_warnings(make_profile()) == []
    (found,) = find_warnings(make_profile(**changes))
    assert re.search(message, found)


ONE = [
    (
        "block",
        1,
        "Nothing could be corrected: at level block .* level: linear corrects",
    ),
    ("block", 2, None),
    ("part", 1, None),
    ("linear", 1, None),
]


@pytest.mark.parametrize(("level", "blocks", "message"), ONE)
def test_one_group_cannot_be_corrected(
    level: str, blocks: int, message: str | None
) -> None:
    search = make_search(rounds=[])
    for chosen in (search, None):
        profile = make_profile(blocks, level=level, search=chosen)
        told = " ".join(find_warnings(profile))
        assert "no correction beat it" not in told
        assert ("Nothing could be corrected" in told) == bool(message)
        if message:
            assert re.search(message, told)
        elif chosen:
            assert "the slopes gave nothing to correct" in told


def test_one_linear_cannot_be_corrected() -> None:
    profile = make_linear_profile(1, KINDS[:1])
    (told,) = find_warnings(profile)
    assert told.endswith("which has to meet the budget by itself.")


def test_a_confirmed_gain_is_nothing_to_warn_of() -> None:
    assert find_warnings(make_profile(confirmed=make_confirmed())) == []
    unknown = make_confirmed() | {"standard_error": None}
    assert find_warnings(make_profile(confirmed=unknown)) == []


def test_a_descent_that_was_taken_is_nothing_to_warn_of() -> None:
    assert find_warnings(make_profile(search=make_descent())) == []
    (kept,) = find_warnings(make_profile(search=make_descent(taken=0)))
    assert kept.startswith("The base allocation was kept")


def test_the_search_may_have_stayed_at_uniform() -> None:
    """There is no outcome of rounds then that could fail to hold."""
    confirmed = make_confirmed("uniform", base=4.6)
    del confirmed["losses"]["searched"]
    assert find_warnings(make_profile(confirmed=confirmed)) == []


@pytest.mark.parametrize(("target", "told"), [(1e-5, False), (0.1, True)])
def test_what_was_to_stay_dense_is_no_trouble(target: float, told: bool) -> None:
    profile = make_linear_profile(blocks=4)
    linear = next(iter(profile["blocks"][0]["linears"].values()))
    linear |= {"sparsity": target, "realised_sparsity": 0.0}
    found = any("Left dense" in warning for warning in find_warnings(profile))
    assert found == told


def test_linears_at_the_cap_are_named() -> None:
    profile = make_linear_profile(blocks=4)
    profile["settings"]["max_sparsity"] = 0.5
    for block in profile["blocks"]:
        block["sparsity"] = 0.45
        for linear in block["linears"].values():
            linear["sparsity"] = 0.4
    profile["blocks"][2]["linears"]["mlp.up_proj"]["sparsity"] = 0.5
    (found,) = find_warnings(profile)
    assert found == "At the cap, max_sparsity 0.5: model.layers.2.mlp.up_proj."


def test_linears_that_stayed_dense_are_named() -> None:
    profile = make_profile()
    for block in profile["blocks"][:5]:
        block["linears"][KINDS[1]]["realised_sparsity"] = 0.0
    (found,) = find_warnings(profile)
    assert "model.layers.0.mlp.up_proj, " in found and "and 1 more" in found


def test_linears_without_tokens_are_named_once() -> None:
    profile = make_profile()
    name = f"{profile['blocks'][0]['name']}.{KINDS[1]}"
    profile["blocks"][0]["linears"][KINDS[1]]["realised_sparsity"] = 0.0
    profile["unseen_linears"] = [name]
    (found,) = find_warnings(profile)
    assert found.startswith("Saw no token") and name in found


@pytest.mark.parametrize(
    "start, chosen, name",
    [
        ("base", "uniform", "uniform"),
        ("base", "halfway", "halfway between owl and uniform"),
        ("uniform", "halfway", "halfway between uniform and owl"),
        ("uniform", "base", "that of owl alone"),
    ],
)
def test_a_start_that_was_kept_and_not_taken(
    start: str, chosen: str, name: str
) -> None:
    """It is told once, and nothing is said to have been found or kept."""
    confirmed = make_confirmed(chosen, halfway=4.35, uniform=4.4, searched=4.5)
    confirmed["losses"][chosen] = 4.3
    search = make_descent(taken=0) | {"start": start}
    told = find_warnings(make_profile(search=search, confirmed=confirmed))
    (found,) = [one for one in told if "so the allocation is" in one]
    assert found.endswith(f"so the allocation is {name}.")
    kept = "owl" if start == "base" else "uniform"
    assert found.startswith(f"No correction beat {kept} under masks. Judged by")
    assert not any("was kept" in one or "had found" in one for one in told)
    assert not any("nothing beat it" in one for one in told)


def test_a_search_from_another_start_that_did_not_hold() -> None:
    confirmed = make_confirmed("base", base=4.4, searched=4.5) | {"anew": True}
    told = find_warnings(make_profile(confirmed=confirmed))
    assert told[0].endswith("Neither outcome did better than owl.")
