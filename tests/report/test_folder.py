"""What lies in a report_dir before a run, and what of it is there afterwards."""

import json
from pathlib import Path

import pytest
from helpers import runs, tiny

from absorb_plugin.report import profile as report_profile

PLAIN = {"strength": 0, "allocator": "uniform"}
BOTH = ("self_attn", "mlp")


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_profile, "draw_profile", lambda profile: b"")


def prune(
    folder: Path, parts: tuple[str, ...] = BOTH, apart: bool = False, again: str = ""
) -> None:
    """
    :param parts: of the blocks, each for a pruner of its own
    :param apart: each after a modifier of its own
    :param again: how the folder is written in the modifiers after the first
    """
    pruners = [runs.pruner(targets=[rf"re:.*{part}\..*_proj$"]) for part in parts]
    recipe = []
    for number, pruner in enumerate(pruners):
        if apart or number == 0:
            given = again if number and again else folder
            recipe.append(runs.absorption(**PLAIN, report_dir=given))
        recipe.append(pruner)
    model = tiny.make_model("llama", num_hidden_layers=2)
    runs.run(model, recipe, folder.parent)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


FIRST = {"profile.json", "profile.png", "report.html"}
SECOND = {"profile_2.json", "profile_2.png", "report_2.html"}


@pytest.mark.parametrize("apart", [False, True])
def test_reports_of_an_earlier_run_do_not_stay(tmp_path: Path, apart: bool) -> None:
    folder = tmp_path / "r"
    prune(folder, apart=apart)
    assert names(folder) == FIRST | SECOND
    prune(folder, apart=apart)  # its own second report stays
    assert names(folder) == FIRST | SECOND
    mine = {"profile_3.json", "profile_x.json", "report_4.html"}
    for name in mine:
        (folder / name).write_text('{"mine": 1}')
    prune(folder, BOTH[:1])
    assert names(folder) == FIRST | mine


def runs_in(folder: Path) -> list[str]:
    return [json.loads(path.read_text())["run"] for path in folder.glob("*.json")]


@pytest.mark.parametrize("apart", [False, True])
def test_the_reports_of_a_run_share_its_id(tmp_path: Path, apart: bool) -> None:
    for name in ("a", "b"):
        prune(tmp_path / name, apart=apart)
        first, second = runs_in(tmp_path / name)
        assert first == second
    assert runs_in(tmp_path / "a") != runs_in(tmp_path / "b")


def test_a_folder_by_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prune(Path("r"), apart=True, again="./r/../r")
    assert names(tmp_path / "r") == FIRST | SECOND


@pytest.mark.parametrize("name", [*sorted(FIRST), *sorted(SECOND)])
def test_files_that_are_no_report_are_not_replaced(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / name).write_text('{"mine": 1}')
    with (
        pytest.raises(ValueError, match=f"report_dir='.*{name} would be replaced"),
    ):
        prune(folder)
    assert (folder / name).read_text() == '{"mine": 1}'
    assert names(folder) == {name}
    if name in SECOND:  # which is not in the way of a single report
        prune(folder, BOTH[:1])
        assert names(folder) == FIRST | {name}


def test_a_report_replaces_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    prune(folder, BOTH[:1])
    (folder / "profile.png").unlink()  # as where it could not be drawn
    prune(folder, BOTH[1:])
    (block, _) = json.loads((folder / "profile.json").read_text())["blocks"]
    assert "mlp.up_proj" in block["linears"] and names(folder) == FIRST


@pytest.mark.parametrize("kept", [{"profile.json"}, {"profile_2.json"}])
def test_part_of_a_report_is_one(tmp_path: Path, kept: set[str]) -> None:
    """Profiles that were deleted; a file of such a name that is no profile stays."""
    folder = tmp_path / "r"
    prune(folder)
    (gone,) = {"profile.json", "profile_2.json"} - kept
    (folder / gone).unlink()
    prune(folder)
    assert names(folder) == FIRST | SECOND
    (folder / gone).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=f"{gone} would be replaced"):
        prune(folder)
