"""Files of a report. None of them is worth the run."""

from collections.abc import Callable
from pathlib import Path

from loguru import logger

from absorb_plugin.files import replace_file

__all__ = ["write_or_warn"]


def write_or_warn(path: Path, make: Callable[[], bytes]) -> None:
    """
    Write what `make` returns, whole or not at all. Whatever goes wrong, a full disk or
    an error while drawing, is a warning: hours of pruning must not be lost for it.
    """
    try:
        replace_file(path, make())
    except OSError as error:
        logger.warning(
            f"{path} could not be written ({error.strerror or error}); the run goes on "
            "without it. Make room, or name another place"
        )
    except Exception as error:
        logger.opt(exception=error).debug(f"{path} was not made")
        logger.warning(
            f"{path} could not be made ({type(error).__name__}: {error}); the run goes "
            "on without it"
        )
