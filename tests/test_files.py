from pathlib import Path

import pytest

from absorb_plugin.files import check_file, check_writable


def test_what_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    check_file(tmp_path / "new.json", "--out")
    check_file(Path("new.json"), "--out")
    with pytest.raises(IsADirectoryError, match="--out .* is a directory"):
        check_file(tmp_path, "--out")
    with pytest.raises(NotADirectoryError, match="--out .*: .*missing is no directory"):
        check_file(tmp_path / "missing" / "new.json", "--out")


def test_a_file_of_the_user_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / ".writable"
    mine.write_text("mine")
    check_writable("report_dir", str(tmp_path))
    assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine]
