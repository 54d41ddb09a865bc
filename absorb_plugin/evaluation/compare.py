"""Runs side by side: perplexity, accuracies and realised sparsity."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from absorb_plugin.evaluation.compare_files import check_profile, check_result, whole
from absorb_plugin.files import json_object, replace_file
from absorb_plugin.report.profile import SCHEMA_VERSION
from absorb_plugin.report.words import outcome_name

__all__ = ["Run", "as_dict", "read_runs", "save_result", "task_names"]


# Of a task beside its `acc` and `n`.
JUDGED = ("acc_norm", "stderr")


@dataclass(frozen=True)
class Run:
    """
    What is known of one run; None for what is not.

    :param allocation: base allocator, and whether it was corrected; "uniform" where
        that was taken
    :param budget: the sparsity asked for
    :param sparsity: counted in the model that was evaluated, else in the report
    :param perplexity: may be infinite
    :param tokens: that the perplexity is over
    :param tasks: name -> `acc`, `acc_norm`, `stderr`, `n`
    """

    name: str
    model: str | None = None
    pruner: str | None = None
    allocation: str | None = None
    budget: float | None = None
    sparsity: float | None = None
    perplexity: float | None = None
    tokens: int | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


def save_result(
    path: Path, model: str, sparsity: float | None, result: Mapping[str, Any]
) -> None:
    """
    :param path: file for `read_runs`
    :param model: directory or hub id that was evaluated
    :param sparsity: share of zeros in its Linears
    :param result: what `absorb eval --json` prints
    """
    content = {"model": model, "sparsity": sparsity, **result}
    replace_file(path, json.dumps(content, indent=1, allow_nan=False).encode())


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """
    :param paths: directories that hold profile.json (themselves or in `report/`),
        eval*.json, or both; or single files of either kind
    :raises FileNotFoundError: if there is no such file or directory
    :raises ValueError: if one holds neither, a file is damaged, or files contradict
        each other
    """
    runs = [_read_run(path, name) for path, name in zip(paths, _names(paths))]
    _warn_of_different_measures(runs)
    return runs


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole where that does not tell them apart."""
    short = [path.stem if path.is_file() else path.resolve().name for path in paths]
    return [
        name if short.count(name) == 1 else str(path)
        for path, name in zip(paths, short, strict=True)
    ]


def _read_run(path: Path, name: str) -> Run:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run")
    files = [path] if path.is_file() else _files_of(path)
    contents = {file: json_object(file.read_bytes(), str(file)) for file in files}
    profiles = {f: x for f, x in contents.items() if "schema_version" in x}
    results = [(f, x) for f, x in contents.items() if f not in profiles]
    fields: dict[str, Any] = {"tasks": {}}
    for file, profile in profiles.items():
        if profile["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"{file}: schema_version {profile['schema_version']}, this version "
                f"reads {SCHEMA_VERSION}"
            )
        check_profile(file, profile)
    _check_same_run(profiles)
    if profiles:
        fields |= _from_profiles(list(profiles.values()))
    for file, result in results:
        _add_result(fields, file, result)
    _check_same_model(results)
    return Run(name, **fields)


def _check_same_run(profiles: Mapping[Path, Mapping[str, Any]]) -> None:
    """
    Two runs with one `report_dir` leave a mixture where they overlap.

    :raises ValueError: naming two files that are not of one run
    """
    runs = {file: profile.get("run") for file, profile in profiles.items()}
    for first, file in pairwise(runs):
        if runs[first] != runs[file]:  # earlier versions wrote none
            raise ValueError(
                f"{first} and {file} are of different runs, as where two wrote into "
                "one report_dir at once: run one of them again, or remove the file "
                "that is not of the run you mean"
            )


def _check_same_model(results: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """:raises ValueError: naming two results that are not of one model"""
    for (first, one), (file, other) in pairwise(results):
        for key in ("model", "sparsity"):
            a, b = one.get(key), other.get(key)
            if None not in (a, b) and not _alike(key, a, b):
                raise ValueError(
                    f"{first} and {file} are of different models ({key} {a} and {b}): "
                    "put them into a directory each"
                )


def _alike(key: str, a: Any, b: Any) -> bool:
    if key == "model":  # by any spelling
        return Path(a).resolve() == Path(b).resolve()
    return math.isclose(a, b, abs_tol=1e-6)


def _files_of(folder: Path) -> list[Path]:
    profiles = sorted(folder.glob("profile*.json"))
    if not profiles:
        profiles = sorted((folder / "report").glob("profile*.json"))
    found = [*profiles, *sorted(folder.glob("eval*.json"))]
    if not found:
        raise ValueError(
            f"{folder} holds neither profile.json (also sought in report/) nor "
            f"eval*.json. Have absorb eval write one there"
        )
    return found


def _from_profiles(profiles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One profile per pruning modifier; shares are weighted by their weights."""
    first = profiles[0]
    sizes = [sum(b["parameters"] for b in profile["blocks"]) for profile in profiles]
    realised = [profile["realised"] for profile in profiles]
    return {
        "model": first["model"]["name_or_path"] or first["model"]["class"],
        "pruner": ", ".join(dict.fromkeys(profile["pruner"] for profile in profiles)),
        "allocation": ", ".join(dict.fromkeys(map(outcome_name, profiles))),
        "budget": float(np.average([p["budget"] for p in profiles], weights=sizes)),
        # null until the run is finished
        "sparsity": None
        if None in realised
        else float(np.average(realised, weights=sizes)),
    }


def _add_result(fields: dict[str, Any], file: Path, result: Mapping[str, Any]) -> None:
    tasks = {
        key: value
        for key, value in result.items()
        if isinstance(value, dict) and _is_task(value)
    }
    if "perplexity" not in result and not tasks:
        raise ValueError(f"{file} is no result of `absorb eval` and no profile.json")
    check_result(file, result, tasks)
    measures = ("perplexity", "tokens")
    twice = [key for key in measures if key in result and key in fields]
    twice += [key for key in tasks if key in fields["tasks"]]
    if twice:
        raise ValueError(
            f"{file}: another file of the run has {twice[0]!r} as well; remove one"
        )
    fields["tasks"] |= {
        name: {key: whole(value) if key == "n" else value for key, value in one.items()}
        for name, one in tasks.items()
    }
    fields |= {key: result[key] for key in measures if key in result}
    if "tokens" in fields:
        fields["tokens"] = whole(fields["tokens"])
    for key in ("model", "sparsity"):
        if result.get(key) is not None:
            fields[key] = result[key]


def _is_task(entry: Mapping[str, Any]) -> bool:
    """A damaged one too; not whatever else another program counts with an `n`."""
    return "acc" in entry or ("n" in entry and not entry.keys().isdisjoint(JUDGED))


def _warn_of_different_measures(runs: Sequence[Run]) -> None:
    """Numbers over different texts or items cannot be compared."""
    counts: dict[str, set[int]] = {}
    for run in runs:
        if run.tokens is not None:
            counts.setdefault("the perplexity", set()).add(run.tokens)
        for name, task in run.tasks.items():
            counts.setdefault(f"task {name!r}", set()).add(task["n"])
    for what, found in counts.items():
        if len(found) > 1:
            logger.warning(
                f"Runs differ in what {what} is over: {sorted(found)} tokens or items"
            )


def as_dict(runs: Sequence[Run]) -> dict[str, Any]:
    """What `absorb compare --json` prints. An infinite perplexity is None."""
    found = [asdict(run) for run in runs]
    for run in found:
        if run["perplexity"] is not None and not math.isfinite(run["perplexity"]):
            run["perplexity"] = None
    return {"runs": found}


def task_names(runs: Sequence[Run]) -> list[str]:
    """Every task of any run, in the order of their first appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.tasks))
