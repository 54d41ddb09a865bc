"""What is wrong, in words: with the fields of a recipe, or by an exception."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

__all__ = ["argument_problem", "check_patterns", "default_of", "in_one_line"]
__all__ += ["in_words"]


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
    return _text(error)


def _text(error: Mapping[str, Any]) -> str:
    text = error["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def argument_problem(taker: type[BaseModel], error: Mapping[str, Any]) -> str:
    """
    :param taker: an allocator or a signal
    :param error: one of pydantic's about its arguments
    :return: argument, value, reason, and what there is to give
    """
    field = ".".join(map(str, error["loc"])) or "arguments"
    fields = taker.model_fields
    takes = ", ".join(
        f"{name} (required)" if info.is_required() else f"{name}={default_of(info)!r}"
        for name, info in fields.items()
    )
    if error["type"] == "missing":
        return f"{field} is required. It takes {takes}."
    if error["type"] == "extra_forbidden":
        close = get_close_matches(field, fields, n=1)
        remedy = f", did you mean {close[0]!r}?" if close else "."
        return (
            f"{field}={error['input']!r} is no argument of it{remedy} It takes "
            f"{takes or 'none'}."
        )
    return f"{field}={error['input']!r}: {_text(error)}. Defaults: {takes}."


def default_of(field: FieldInfo) -> Any:
    """None where it is required; a remark where there is none before it is built."""
    if field.is_required():
        return None
    if field.default_factory_takes_validated_data:
        return "(made of the others)"
    try:
        return field.get_default(call_default_factory=True)
    except Exception as error:
        return f"(cannot be made: {error!r})"


def in_one_line(error: Exception) -> str:
    """Kind and message, for a message of ours that tells what to do."""
    return " ".join(f"{type(error).__name__}: {error}".split())


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
                    f"{field} holds {pattern!r}, which is no regular expression: "
                    f"{error}"
                ) from error
