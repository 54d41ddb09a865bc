"""Recipe files as `absorb prune` reads them."""

import re
from pathlib import Path

import pytest

from absorb_plugin.evaluation.oneshot import (
    check_caches,
    keep_profiles,
    least_bits,
    load_recipe,
    parse_recipe,
    stage_reports,
)

DOC = Path(__file__).parents[2] / "docs" / "recipe.md"
OURS = "AbsorptionAllocationModifier: {strength: 0}"
WANDA = "WandaPruningModifier: {sparsity: 0.5, targets: [Linear]}"


def recipe_file(
    folder: Path, *modifiers: str, name: str = "recipe.yaml", text: str = ""
) -> Path:
    lines = "".join(f"    {modifier}\n" for modifier in modifiers)
    path = folder / name
    path.write_text(text or f"a_stage:\n  b_modifiers:\n{lines}")
    return path


def test_two_modifiers_of_a_class_in_one_group_are_refused(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, OURS, WANDA, OURS, WANDA)
    message = (
        r"recipe.yaml: a_stage > b_modifiers has 'AbsorptionAllocationModifier' twice, "
        r"in lines 3 and 5, .* Put .* into a group of its own, b_2_modifiers:$"
    )
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


TWICE = {
    "a stage": (f"a_stage: {{}}\na_stage:\n  b_modifiers:\n    {WANDA}\n", "another"),
    "a group": (
        f"a_stage:\n  b_modifiers:\n    {OURS}\n  b_modifiers:\n    {WANDA}\n",
        "a_stage has 'b_modifiers' twice, in lines 2 and 4, .*another name",
    ),
    "a field": (
        "a_stage: {b_modifiers: {WandaPruningModifier: {sparsity: 1,\n sparsity: 1}}}",
        "'sparsity' twice, in lines 1 and 2, .*Remove one",
    ),
    "a field in one line": (
        "a_stage: {b_modifiers: {WandaPruningModifier: {sparsity: 1, sparsity: 1}}}",
        "'sparsity' twice, in line 1, .*Remove one",
    ),
    "deep": (
        f"a_stage:\n  b_modifiers:\n    {WANDA}\n    AWQModifier:\n      mappings:\n"
        "      - {a: {b: {c: {d: 1,\n d: 2}}}}\n",
        "a_stage > b_modifiers > AWQModifier > mappings > 0 > a > b > c has 'd' twice, "
        "in lines 6 and 7, .*Remove one",
    ),
}


@pytest.mark.parametrize("what", TWICE)
@pytest.mark.parametrize(
    ("name", "fence"),
    [("recipe.yaml", ""), ("RECIPE.YML", ""), ("r.md", "---"), ("R.MD", "+++")],
)
def test_other_keys_that_are_there_twice(
    tmp_path: Path, what: str, name: str, fence: str
) -> None:
    text, message = TWICE[what]
    if name.endswith(".md"):  # a title in front of it moves the lines
        text = f"# Title\n\n{fence}\n{text}\n{fence}\nWords. a: 1\n- [\n"
        message = re.sub(
            r"(?<=[es] )\d|(?<=and )\d", lambda n: f"{int(n[0]) + 3}", message
        )
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file(tmp_path, name=name, text=text))


def test_json_with_a_key_twice(tmp_path: Path) -> None:
    fields = '{"sparsity": 0.5}'
    group = f'{{"WandaPruningModifier": {fields},\n"WandaPruningModifier": {fields}}}'
    text = f'{{\n\t"a_stage": {{"b_modifiers": {group}}}}}'
    with pytest.raises(ValueError, match="'WandaPruningModifier' twice, in lines 2"):
        load_recipe(recipe_file(tmp_path, name="recipe.json", text=text))


def test_keys_that_are_not_looked_at(tmp_path: Path) -> None:
    """Outside stages, and an anchor within itself."""
    text = (
        f"notes: {{a: 1, a: 2}}\nnotes: 3\na_stage:\n  x: &x [*x]\n"
        f"  b_modifiers:\n    {WANDA}\n"
    )
    (modifier,) = load_recipe(recipe_file(tmp_path, text=text)).modifiers
    assert modifier.sparsity == 0.5


@pytest.mark.parametrize("title", ["", "# Title\n\n"])
def test_a_mistake_in_front_matter(tmp_path: Path, title: str) -> None:
    """Words after it are no part of the recipe."""
    text = "a_stage:\n  b_modifiers:\n    WandaPruningModifier:\n"
    text = f"{title}---\n{text}---\nWords: [\n"
    with pytest.raises(ValueError, match="`WandaPruningModifier:` has no fields"):
        load_recipe(recipe_file(tmp_path, name="recipe.md", text=text))


def test_a_key_may_be_in_several_mappings(tmp_path: Path) -> None:
    text = (
        "a_stage:\n  b_modifiers:\n"
        "    WandaPruningModifier: &w {sparsity: 0.5, targets: [Linear]}\n"
        "  c_modifiers:\n    WandaPruningModifier: {<<: *w, sparsity: 0.6}\n"
    )
    found = load_recipe(recipe_file(tmp_path, text=text)).modifiers
    assert [modifier.sparsity for modifier in found] == [0.5, 0.6]


def test_the_documented_recipe_has_all_its_modifiers(tmp_path: Path) -> None:
    (text,) = [
        x
        for x in re.findall("```yaml\n(.*?)```", DOC.read_text(), re.S)
        if "mlp_m" in x
    ]
    found = load_recipe(recipe_file(tmp_path, text=text)).modifiers
    assert [modifier.report_dir for modifier in found[::2]] == [
        "report/attention",
        "report/mlp",
    ]
    assert [modifier.sparsity for modifier in found[1::2]] == [0.4, 0.6]


def test_directories_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ours = "AbsorptionAllocationModifier: {report_dir: ~/out/report}"
    recipe = load_recipe(recipe_file(tmp_path, ours, WANDA))
    stage_reports(recipe, Path("~/out"), tmp_path / "staging")
    (modifier, _) = recipe.modifiers
    assert modifier._report_dir == str(tmp_path / "staging" / "report")
    keep_profiles(recipe, Path("~/cache"))
    assert modifier.profile_cache == str(tmp_path / "cache")
    check_caches(recipe, Path("~/out"))
    keep_profiles(recipe, Path("~/out/cache"))
    with pytest.raises(ValueError, match="where the model replaces"):
        check_caches(recipe, Path("~/out"))


@pytest.mark.parametrize(
    ("modifier", "bits"),
    [
        ("SmoothQuantModifier: {smoothing_strength: 0.5}", None),
        ("QuantizationModifier: {targets: [Linear], scheme: W8A8}", 8),
        ("QuantizationModifier: {targets: [Linear], scheme: FP8_DYNAMIC}", 8),
        ("GPTQModifier: {targets: [Linear], scheme: W4A16}", 4),
        (
            "QuantizationModifier: {config_groups: {g: {targets: [Linear], "
            "weights: {num_bits: 3}}}}",
            3,
        ),
    ],
)
def test_the_fewest_bits_of_a_recipe(modifier: str, bits: int | None) -> None:
    text = "a_stage:\n  a_modifiers:\n    WandaPruningModifier: {sparsity: 0.5}\n"
    recipe = parse_recipe(f"{text}    {modifier}\n")
    before = [one.model_dump() for one in recipe.modifiers]
    assert least_bits(recipe) == bits
    assert [one.model_dump() for one in recipe.modifiers] == before
