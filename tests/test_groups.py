"""Groups of Linears that are corrected alike, at every level."""

import numpy as np
import pytest
from helpers import tiny

from absorb_plugin.blocks import find_blocks
from absorb_plugin.groups import LEVELS, Groups, linear_names, linear_sizes, named

EXPERTS = {
    "qwen3_moe": ("mlp", 4),
    "mixtral": ("mlp", 4),
    "qwen2_moe": ("mlp", 4),
    "granitemoe": ("block_sparse_moe", 4),
}


def test_blocks_parts_and_linears() -> None:
    blocks = find_blocks(tiny.make_model("llama"))
    names = linear_names(blocks)
    block, part, linear = (Groups.at(level, blocks) for level in LEVELS)
    assert block.names == tuple(f"model.layers.{i}" for i in range(3))
    assert part.names == tuple(
        f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")
    )
    assert linear.names == tuple(names)
    for groups in (block, part, linear):
        assert groups.linears == tuple(names)
        assert len(groups) == len(groups.names) == len(groups.block_of)
        for name, group in zip(names, groups.of, strict=True):
            assert name.startswith(groups.names[group])
            assert groups.block_of[group] == int(name.split(".")[2])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_every_linear_is_in_one_group_of_its_block(
    architecture: str, level: str
) -> None:
    blocks = find_blocks(tiny.make_model(architecture))
    groups = Groups.at(level, blocks)
    assert len(groups.of) == len(groups.linears) == len(blocks.linears())
    assert sorted(set(groups.of)) == list(range(len(groups)))
    home = {b.full_name(n): i for i, b in enumerate(blocks.blocks) for n in b.linears}
    for linear, group in zip(groups.linears, groups.of, strict=True):
        assert groups.block_of[group] == home[linear]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("architecture", list(EXPERTS))
def test_experts_share_a_group(architecture: str, level: str) -> None:
    """At the level of Linears one per kind of projection."""
    blocks = find_blocks(tiny.make_model(architecture))
    groups = Groups.at(level, blocks)
    kinds: dict[tuple[int, str], set[int]] = {}
    shared = {}
    for linear, group in zip(groups.linears, groups.of, strict=True):
        if ".experts." in linear:
            block, kind = int(groups.block_of[group]), linear.rsplit(".", 1)[1]
            kinds.setdefault((block, kind), set()).add(int(group))
        else:
            shared[linear] = int(group)
    assert len(kinds) >= 3 and all(len(found) == 1 for found in kinds.values())
    if level == "linear":
        of_experts = [*map(tuple, kinds.values())]
        assert len(set(of_experts)) == len(kinds)
        assert not {g for (g,) in of_experts} & set(shared.values())


def test_linears_directly_in_a_block_make_one_part() -> None:
    parts = Groups.at("part", find_blocks(tiny.make_model("opt")))
    assert parts.names[:2] == (
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.0.(own Linears)",
    )
    own = {n for n, g in zip(parts.linears, parts.of, strict=True) if g == 1}
    assert own == {f"model.decoder.layers.0.fc{i}" for i in (1, 2)}


@pytest.mark.parametrize("level", LEVELS)
def test_spread_total_and_mean(level: str) -> None:
    blocks = find_blocks(tiny.make_model("qwen3_moe"))
    groups, random = Groups.at(level, blocks), np.random.default_rng(0)
    values, each = random.normal(size=len(groups)), random.normal(size=len(groups.of))
    sizes = linear_sizes(blocks)
    assert groups.sizes.tolist() == sizes.tolist()
    linears = blocks.linears().values()
    assert sizes.tolist() == [x.in_features * x.out_features for x in linears]
    spread = groups.spread(values)
    for group, value in enumerate(values):
        own = groups.of == group
        assert (spread[own] == value).all()
        assert groups.total(each)[group] == pytest.approx(each[own].sum())
        assert groups.group_sizes[group] == sizes[own].sum()
        mean = (sizes * each)[own].sum() / sizes[own].sum()
        assert groups.mean(each)[group] == pytest.approx(mean)
    np.testing.assert_allclose(groups.mean(spread), values)


def test_of_some_linears() -> None:
    """Blocks without any have no group."""
    whole = find_blocks(tiny.make_model("llama"))
    some = [n for n in whole.linears() if "layers.1" not in n and "mlp" in n]
    blocks = whole.restrict(some)
    groups = Groups.at("block", blocks)
    assert groups.names == ("model.layers.0", "model.layers.2")
    assert groups.block_of.tolist() == [0, 2] and groups.linears == tuple(some)
    by_name = named(blocks, np.arange(6.0))
    assert by_name == dict(zip(some, range(6), strict=True))
