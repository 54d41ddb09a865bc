import os
from pathlib import Path

import pytest

from absorb_plugin.files import check_file, check_writable, replace_file


def test_what_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    check_file(tmp_path / "new.json", "--out")
    check_file(Path("new.json"), "--out")
    with pytest.raises(IsADirectoryError, match="--out .* is a directory"):
        check_file(tmp_path, "--out")
    with pytest.raises(NotADirectoryError, match="--out .*: .*missing is no directory"):
        check_file(tmp_path / "missing" / "new.json", "--out")
    (tmp_path / "link").symlink_to(tmp_path / "missing" / "new.json")
    with pytest.raises(NotADirectoryError, match="--out .*link: .*missing is no dir"):
        check_file(tmp_path / "link", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_directory_that_takes_no_file(tmp_path: Path) -> None:
    if Path("/proc/self").is_dir():  # nobody may write there, not even root
        with pytest.raises(OSError, match="--out /proc/x: /proc cannot be written to"):
            check_file(Path("/proc/x"), "--out")
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root writes anywhere")
    with pytest.raises(OSError, match="--out .*cannot be written to"):
        check_file(tmp_path / "new.json", "--out")


def test_what_is_no_regular_file_is_left(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path(os.devnull)):
        with pytest.raises(FileExistsError, match=f"--out {path} is a device or a"):
            check_file(path, "--out")
    with pytest.raises(FileExistsError, match="pipe is a device or a pipe"):
        replace_file(pipe, b"new")
    assert pipe.is_fifo()


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "disk" / "new.json"
    link.symlink_to(target)
    for content in (b"old", b"new"):
        check_file(link, "--out")
        replace_file(link, content)
        assert link.is_symlink() and target.read_bytes() == content
    assert len(list(tmp_path.rglob("*"))) == 3


def test_a_file_of_the_user_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / ".writable"
    mine.write_text("mine")
    check_writable("report_dir", str(tmp_path))
    assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine]
