"""`absorb` in this process, and what it leaves behind."""

from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from absorb_plugin.cli.app import app

__all__ = ["absorb", "error_of", "files_in"]


def absorb(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(*arguments: object) -> str:
    """Run a command that must fail with one clear line, and give that line back."""
    result = absorb(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


def files_in(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}
