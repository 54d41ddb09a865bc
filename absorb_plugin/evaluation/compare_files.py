"""Files that `absorb compare` reads: what it needs of each, checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

__all__ = ["check_profile", "check_result", "whole"]


def whole(value: object) -> object:
    """99.0 as 99: other programs write whole numbers so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, BeforeValidator(whole), Field(ge=1)]
# Infinity is measured; that NaN is not is said by `gt`.
Perplexity = Annotated[float, Field(gt=0, allow_inf_nan=True)]
# A wrong value is shown, and no more of it than can be read.
LONGEST = 40


class _Checked(BaseModel):
    # what JSON has no word for, and numbers in quotes, are nothing to compare
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Model(_Checked):
    name_or_path: str
    kind: str = Field(alias="class")


class _Settings(_Checked):
    allocator: str
    strength: float | Literal["auto"]


class _Round(_Checked):
    chosen: float


class _Search(_Checked):
    start: Literal["base", "uniform"]
    taken: int
    rounds: list[_Round]


class _Confirmed(_Checked):
    chosen: str


class _Linear(_Checked):
    base_sparsity: Share
    sparsity: Share


class _Block(_Checked):
    parameters: Count
    linears: dict[str, _Linear]


class _Profile(_Checked):
    model: _Model
    pruner: str
    settings: _Settings
    search: _Search | None
    confirmed: _Confirmed | None
    budget: Share
    realised: Share | None
    blocks: Annotated[list[_Block], Field(min_length=1)]


class _Task(_Checked):
    acc: Share
    acc_norm: Share | None = None
    stderr: Annotated[float, Field(ge=0)] | None = None
    n: Count


class _Result(_Checked):
    model: str | None = None
    sparsity: Share | None = None
    perplexity: Perplexity | None = None
    tokens: Count | None = None
    tasks: dict[str, _Task]


def check_profile(file: Path, profile: Mapping[str, Any]) -> None:
    """
    :param profile: content of a profile.json of this version's schema
    :raises ValueError: naming the file and a field that is missing or wrong
    """
    _check(_Profile, file, profile)


def check_result(
    file: Path, result: Mapping[str, Any], tasks: Mapping[str, Any]
) -> None:
    """
    :param result: what `absorb eval --out` writes
    :param tasks: those of it
    :raises ValueError: naming the file and a field that is missing or wrong
    """
    rest = {key: value for key, value in result.items() if key not in tasks}
    _check(_Result, file, {**rest, "tasks": tasks})


def _check(kind: type[_Checked], file: Path, content: Mapping[str, Any]) -> None:
    try:
        kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(
            f"{file}: {_problem(error)}. The file is damaged, or somebody else's: make "
            "it anew, or leave it out"
        ) from error


def _problem(error: ValidationError) -> str:
    """The first one in words: field, value, reason."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"])).removeprefix("tasks.")
    if first["type"] == "missing":
        return f"{field} is missing"
    value = repr(first["input"])
    shown = value if len(value) <= LONGEST else f"{value[:LONGEST]}…"
    return f"{field}={shown}: {first['msg'][:1].lower()}{first['msg'][1:]}"
