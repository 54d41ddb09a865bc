"""What is wrong with the fields of a recipe, in words."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

__all__ = ["check_patterns", "in_words"]


def in_words(error: ValidationError, fields: Iterable[str]) -> str:
    """
    :param fields: that there are, for the remedy of a name that was mistyped
    :return: field, value and reason of everything that is wrong
    """
    fields = list(fields)
    found: dict[str, list[str]] = {}
    for one in error.errors():
        # of a field that takes several kinds there is an error for each kind
        found.setdefault(_subject(one), []).append(_reason(one, fields))
    return "; ".join(subject + " or ".join(told) for subject, told in found.items())


def _subject(error: Mapping[str, Any]) -> str:
    """`field=value: `; empty where the reason names the field."""
    path = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{path} "
    if not path or error["msg"].startswith(f"Value error, {path}"):
        return ""
    # the second part of two is the kind that was tried, where there are several
    name = path if len(error["loc"]) > 2 else error["loc"][0]
    return f"{name}={error['input']!r}: "


def _reason(error: Mapping[str, Any], fields: list[str]) -> str:
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "extra_forbidden":
        close = get_close_matches(str(error["loc"][0]), fields, n=1)
        remedy = f", did you mean {close[0]}?" if close else ""
        return f"there is no such field{remedy}"
    text = error["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def check_patterns(field: str, patterns: Iterable[object]) -> None:
    """
    :param patterns: names, or "re:…"
    :raises ValueError: if one is no regular expression
    """
    for pattern in patterns:
        if isinstance(pattern, str) and pattern.startswith("re:"):
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise ValueError(
                    f"{field}: {pattern!r} is no regular expression: {error}"
                ) from error
