"""
Perplexity of every allocation on held-out text, through the real `oneshot`.

    python integration/benchmarks/quality.py MODEL --text CALIBRATION \
        --eval-text HELD_OUT [OTHER ...] [--allocators owl alpha_pruning] \
        [--pruners wanda sparsegpt] [--sparsities 0.5 0.6 0.7] [--seeds 0 1 2] \
        [--methods dense uniform atp base paper ours] [--tasks FILE ...] \
        --out results.jsonl

An allocator may have arguments: `--allocators lsa:beta=0.07 dlp:reduce=median`. Every
pruned model is judged by every held-out text; each text has its table. Its windows are
as long as those that calibrate, or of every length of `--eval-seq-len`, in tables of
their own.

One line of JSON per run, appended as it completes; a run whose line is there already,
with the same settings and the same content of its texts, is not repeated, of whatever
commit it is. `--table` prints the Markdown tables of files of results, one for each
combination of settings, and runs nothing:

    python integration/benchmarks/quality.py --table --out one.jsonl other.jsonl

Methods: `dense`; `uniform`; `atp`, the depth-only ramp at the best of a few β, chosen
on the very text that it is judged by (each by its own), which favours it; `base`, the
allocator alone; `paper`, the noise ratio at η = 1e-2 with noise on every token and
strength 0.1; `ours`, the defaults of the modifier; `evolution`, an evolutionary search
per Linear in the manner of EvoPress by KL divergence, from uniform, by Wanda's masks,
at as many tokens as ours takes before the pruner that follows (`controls.py`). In a
table of their own, with the seconds of the whole `oneshot`: `masks`, ours without the
last comparison; `gradient`, `pruner`, `response` and `noise`, ours with that signal;
`block`, `part` and `linear`, with that level; `quick` and `thorough`, with that effort;
`random`, ours with a random direction of the same length and the judge.

`--tasks` adds zero-shot accuracies (task files as of `absorb eval`) and a table of
them; runs whose line lacks a task, or has it with another `--limit`, are repeated.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import geometric_mean, mean, stdev

import torch
from controls import RandomSlopes, by_name, evolve, tokens_of
from datasets import Dataset
from loguru import logger
from result_lines import (
    append,
    code_version,
    described,
    digest,
    fixed_fields,
    grouped,
    other_code,
    read_lines,
    settings_of,
    to_run,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.blocks import find_blocks
from absorb_plugin.calibration import samples_of
from absorb_plugin.choices import budget_of, widest
from absorb_plugin.cpu import keep_freed_memory
from absorb_plugin.evaluation.documents import read_text
from absorb_plugin.evaluation.oneshot import prune
from absorb_plugin.evaluation.perplexity import linear_sparsity, perplexity
from absorb_plugin.evaluation.tasks import (
    EncodedTask,
    encode_tasks,
    evaluate_tasks,
    read_tasks,
)
from absorb_plugin.evaluation.text import calibration_samples, evaluation_windows
from absorb_plugin.forward.inputs import InputStatistics
from absorb_plugin.forward.runner import ProbeRunner
from absorb_plugin.pruners import PRUNERS
from absorb_plugin.sample_split import SampleSplit
from absorb_plugin.settings import AllocationSettings
from absorb_plugin.signals import SIGNALS

Windows = Sequence[Sequence[int]]
ATP_BETAS = (0.0025, 0.005, 0.01)
OTHERS = (
    *("random", "masks", "gradient", "pruner", "response", "noise"),
    *("block", "part", "linear", "quick", "thorough"),
)


def allocation(
    method: str, allocator: str, cache: Path | None
) -> AbsorptionAllocationModifier | None:
    if method == "uniform":
        return None
    if method.startswith("atp:"):
        return AbsorptionAllocationModifier(
            allocator="atp",
            allocator_args={"beta": float(method.removeprefix("atp:"))},
            strength=0,
        )
    allocator, _, pairs = allocator.partition(":")
    arguments = dict(pair.split("=", 1) for pair in pairs.split(",") if pair)
    settings: dict = {
        "base": {"strength": 0},
        "paper": {
            "signal": "noise",
            "signal_args": {"sink_tokens": "perturb"},
            "strength": 0.1,
        },
        "ours": {},
        "masks": {"confirm_samples": 0},
        "gradient": {"signal": "gradient"},
        "response": {"signal": "response"},
        "noise": {"signal": "noise"},
        "pruner": {"signal": "pruner"},
        "block": {"level": "block"},
        "part": {"level": "part"},
        "linear": {"level": "linear"},
        "quick": {"effort": "quick"},
        "thorough": {"effort": "thorough"},
        "random": {"signal": "random"},
    }[method]
    if cache is not None and method != "base":
        settings["profile_cache"] = str(cache)
    return AbsorptionAllocationModifier(
        allocator=allocator, allocator_args=arguments, **settings
    )


def evolved(
    cell: dict, model: PreTrainedModel, samples: Dataset
) -> tuple[list[str], list[float]]:
    """Names of the Linears and their sparsities, by the evolutionary search."""
    settings = AllocationSettings()
    effort, blocks = settings.measuring(), find_blocks(model)
    batches, pruner = samples_of(samples), PRUNERS[cell["pruner"]]()
    split = SampleSplit(batches, effort, judged=True, by_loss=True)
    runner = ProbeRunner(model, blocks, settings.probe_memory)
    watch = InputStatistics(blocks)
    sums = runner.run("Input statistics", split.statistics, watch)
    budget = budget_of(blocks, cell["sparsity"], settings, pruner)
    found = evolve(
        model,
        blocks,
        sums,
        split,
        budget,
        tokens=tokens_of(batches, effort, pruner, widest(blocks)),
        seed=cell["seed"],
    )
    by_linear = by_name(blocks, budget.whole(found))  # as ours is
    return list(by_linear), list(by_linear.values())


def run(
    cell: dict,
    options: argparse.Namespace,
    tokenizer,
    texts: dict[str, Windows],
    tasks: list[EncodedTask],
) -> dict:
    samples = calibration_samples(
        read_text(options.text),
        tokenizer,
        options.samples,
        options.seq_len,
        cell["seed"],
    )
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    begin = time.perf_counter()
    if cell["method"] == "dense":
        pruned = model.eval()
    else:
        fields = {"sparsity": cell["sparsity"], "targets": ["Linear"]}
        modifier = None
        if cell["method"] == "evolution":
            fields["targets"], fields["sparsity"] = evolved(cell, model, samples)
        else:
            modifier = allocation(cell["method"], cell["allocator"], options.cache)
        kind = PRUNERS[cell["pruner"]].modifier
        pruner = kind(**fields, ignore=["re:.*lm_head"])
        recipe = [pruner] if modifier is None else [modifier, pruner]
        pruned = prune(model, tokenizer, recipe, samples, seed=cell["seed"])
    seconds = time.perf_counter() - begin
    line = cell | {
        "texts": {
            name: judged(pruned, texts[name]) | {"digest": digest(path)}
            for name, (path, _) in eval_texts(options).items()
        },
        "realised": linear_sparsity(pruned),
        "seconds": round(seconds, 1),
        "commit": code_version(),
    }
    if tasks:
        found = evaluate_tasks(pruned, tasks, batch_size=16)
        line["tasks"] = {name: asdict(result) for name, result in found.items()}
    return line


def judged(model: PreTrainedModel, windows: Windows) -> dict:
    value, tokens = perplexity(model, windows)
    return {"perplexity": value, "tokens": tokens}


def cells(options: argparse.Namespace) -> list[dict]:
    fixed = fixed_fields(options)
    methods = [method for method in options.methods if method not in ("dense", "atp")]
    if "atp" in options.methods:
        methods += [f"atp:{beta}" for beta in ATP_BETAS]
    none = {"pruner": "-", "sparsity": 0.0, "allocator": "-", "seed": 0}
    result = [fixed | none | {"method": "dense"}] if "dense" in options.methods else []
    for seed in options.seeds:
        for sparsity in options.sparsities:
            for pruner in options.pruners:
                for method in methods:
                    free = method in ("uniform", "evolution")
                    free |= method.startswith("atp:")
                    for allocator in ["-"] if free else options.allocators:
                        result.append(
                            fixed
                            | {
                                "pruner": pruner,
                                "sparsity": sparsity,
                                "method": method,
                                "allocator": allocator,
                                "seed": seed,
                            }
                        )
    return result


def serving(
    options: argparse.Namespace, tasks: list[EncodedTask], done: list[dict]
) -> list[dict]:
    """Lines that are judged by all texts and tasks of this command."""
    wanted = {encoded.task.name: len(encoded.requests) for encoded in tasks}
    texts = eval_texts(options).items()
    digests = {name: digest(path) for name, (path, _) in texts}
    return [
        line
        for line in done
        if wanted.items() <= items(line).items()
        and digests.items() <= eval_digests(line).items()
    ]


def eval_texts(options: argparse.Namespace) -> dict[str, tuple[Path, int]]:
    """By what tables call it: a file, and the length of its windows."""
    return {
        path.name if length == options.seq_len else f"{path.name} by {length}": (
            path,
            length,
        )
        for path in options.eval_text
        for length in options.eval_seq_len or [options.seq_len]
    }


def eval_digests(line: dict) -> dict[str, str | None]:
    """Name of a text that a run has been judged by -> digest of its content."""
    return {name: found.get("digest") for name, found in line["texts"].items()}


class Results:
    """Perplexities of one model, under one combination of settings, by cell."""

    def __init__(self, lines: list[dict], text: str) -> None:
        self.lines = [line for line in lines if text in line["texts"]]
        self.text = text
        self.keys = sorted(
            {
                (line["pruner"], line["sparsity"], line["allocator"])
                for line in self.lines
                if line["allocator"] != "-"
            }
        )

    def of(self, method: str, pruner: str, sparsity: float, allocator: str) -> dict:
        """Seed -> perplexity."""
        found = self.runs(method, pruner, sparsity, allocator)
        return {
            seed: line["texts"][self.text]["perplexity"] for seed, line in found.items()
        }

    def runs(
        self, method: str, pruner: str, sparsity: float, allocator: str
    ) -> dict[int, dict]:
        """Seed -> line."""
        wanted = (method, pruner, sparsity, allocator)
        names = ("method", "pruner", "sparsity", "allocator")
        return {
            line["seed"]: line
            for line in self.lines
            if tuple(line[name] for name in names) == wanted
        }

    def best_atp(self, pruner: str, sparsity: float) -> dict:
        betas = [self.of(f"atp:{b}", pruner, sparsity, "-") for b in ATP_BETAS]
        return min(filter(None, betas), key=lambda x: mean(x.values()), default={})

    def row(self, pruner: str, sparsity: float, allocator: str) -> dict[str, dict]:
        return {
            "uniform": self.of("uniform", pruner, sparsity, "-"),
            "atp": self.best_atp(pruner, sparsity),
            "evolution": self.of("evolution", pruner, sparsity, "-"),
            "base": self.of("base", pruner, sparsity, allocator),
            "paper": self.of("paper", pruner, sparsity, allocator),
            "ours": self.of("ours", pruner, sparsity, allocator),
        }


def change(ours: dict, other: dict) -> float:
    """Mean over seeds of the relative change in perplexity, as a geometric mean."""
    seeds = ours.keys() & other.keys()
    if not seeds:
        return float("nan")
    return geometric_mean(ours[seed] / other[seed] for seed in seeds) - 1


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.1%}"


def shown(values: dict) -> str:
    """Mean and sample standard deviation over seeds."""
    if not values:
        return "–"
    numbers = list(values.values())
    spread = f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.1f}{spread}"


def table(results: Results) -> str:
    """Markdown: a row per pruner, sparsity, allocator."""
    out = [
        "| pruner | sparsity | uniform | ATP, best β | evolution | base "
        "| its perplexity | paper's setting | ours | vs base | vs uniform | vs ATP "
        "| vs evolution |",
        "|---" * 13 + "|",
    ]
    for pruner, sparsity, allocator in results.keys:
        row = results.row(pruner, sparsity, allocator)
        free = [shown(row[name]) for name in ("uniform", "atp", "evolution")]
        own = [shown(row[name]) for name in ("base", "paper", "ours")]
        cells = [pruner, f"{sparsity:.0%}", *free, allocator, *own]
        others = [row[name] for name in ("base", "uniform", "atp", "evolution")]
        cells += [percent(change(row["ours"], other)) for other in others]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def others_table(results: Results) -> str:
    """Markdown: the methods of OTHERS that were run, beside base and ours."""
    ran = {line["method"] for line in results.lines}
    found = [name for name in OTHERS if name in ran]
    if not found:
        return ""
    names = ["base", "ours", *found]
    out = [f"| pruner | sparsity | base | {' | '.join(['alone', *names[1:]])} |"]
    out.append("|---" * (3 + len(names)) + "|")
    for key in results.keys:
        # of base and ours the same seeds as of the others
        seeds = {seed for name in found for seed in results.runs(name, *key)}
        if seeds:
            pruner, sparsity, allocator = key
            cells = [pruner, f"{sparsity:.0%}", allocator]
            cells += [with_seconds(results, name, key, seeds) for name in names]
            out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def with_seconds(results: Results, method: str, key: tuple, seeds: set[int]) -> str:
    runs = results.runs(method, *key)
    values = {s: v for s, v in results.of(method, *key).items() if s in seeds}
    if not values:
        return "–"
    return f"{shown(values)} ({mean(runs[s]['seconds'] for s in values):.0f} s)"


def summary(models: dict[str, Results]) -> str:
    """Markdown: the mean over models and seeds, of how many models, and the worst."""
    others = {
        "base": "base",
        "uniform": "uniform",
        "atp": "ATP",
        "evolution": "evolution",
    }
    head = ["pruner", "sparsity", "base", *(f"vs {name}" for name in others.values())]
    head += ["worst vs base", "worst vs uniform"]
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key in sorted({key for results in models.values() for key in results.keys}):
        rows = [results.row(*key) for results in models.values()]
        changes = {
            name: [change(row["ours"], row[name]) for row in rows if both(row, name)]
            for name in others
        }
        if not any(changes.values()):
            continue
        pruner, sparsity, allocator = key
        cells = [pruner, f"{sparsity:.0%}", allocator]
        cells += [over_models(found) for found in changes.values()]
        for name in ("base", "uniform"):
            cells.append(percent(max(changes[name], default=math.nan)))
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def both(row: dict[str, dict], name: str) -> bool:
    """Whether ours and another method have a seed in common."""
    return bool(row["ours"].keys() & row[name].keys())


def over_models(changes: list[float]) -> str:
    """Geometric mean, and of how many models."""
    if not changes:
        return "–"
    found = geometric_mean(1 + value for value in changes) - 1
    return f"{percent(found)} ({len(changes)})"


def accuracies(lines: list[dict]) -> str:
    """Markdown: a row per run, a column per task; ± one standard error over items."""
    order = ("pruner", "sparsity", "allocator", "seed", "method")
    runs = {tuple(line[name] for name in order): line for line in lines}
    names = list(dict.fromkeys(name for line in lines for name in line["tasks"]))
    head = ["pruner", "sparsity", "base", "seed", "method", "perplexity", *names]
    head.append("mean")
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (pruner, sparsity, allocator, seed, method), line in sorted(runs.items()):
        cells = [pruner, f"{sparsity:.0%}", allocator, str(seed), method]
        first = next(iter(line["texts"].values()))
        cells.append(f"{first['perplexity']:.1f}")
        results = [line["tasks"].get(name) for name in names]
        cells += [shown_accuracy(result) for result in [*results, averaged(results)]]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def averaged(results: Sequence[dict | None]) -> dict | None:
    """Every task counts alike; None if one was not run."""
    known = [result for result in results if result is not None]
    if len(known) < len(results):
        return None
    errors = [result["stderr"] for result in known]
    unknown = any(error is None for error in errors)
    error = None if unknown else math.hypot(*errors) / len(errors)
    return {"acc": mean(result["acc"] for result in known), "stderr": error}


def shown_accuracy(result: dict | None) -> str:
    """
    :param result: of a task, as `absorb eval` has it; None where it was not run
    """
    if result is None:
        return "–"
    error = result["stderr"]  # None for a single item
    return f"{result['acc']:.1%}" + (f" ± {error:.1%}" if error is not None else "")


def items(line: dict) -> dict[str, int]:
    """Task -> number of its items that a run has been judged by."""
    return {name: result["n"] for name, result in line.get("tasks", {}).items()}


def print_tables(lines: list[dict]) -> None:
    for text in dict.fromkeys(text for line in lines for text in line["texts"]):
        of_text = [line for line in lines if text in line["texts"]]
        for settings, alike in grouped(of_text, partial(judged_by, text)):
            models = {
                of["model"]: Results(own, text) for of, own in grouped(alike, model_of)
            }
            for name, results in models.items():
                print_results(name, settings, results)
            if len(models) > 1:
                about = f"{described(settings)}; {text}"
                print(f"### All models, {about}\n\n{summary(models)}\n")
    with_tasks = [line for line in lines if "tasks" in line]
    for of, own in grouped(with_tasks, lambda x: model_of(x) | settings_of(x)):
        count = max(n for line in own for n in items(line).values())
        print(
            f"### {of['model']}\n\n{described(of)}. Zero-shot accuracy, at most "
            f"{count:,} items per task.\n\n{accuracies(own)}\n"
        )


def model_of(line: dict) -> dict:
    return {"model": line["model"]}


def judged_by(text: str, line: dict) -> dict:
    """Settings of a run, and what of a text it is judged by."""
    judged = line["texts"][text]
    # lines of earlier versions tell the number of windows by that of tokens alone
    windows = line.get("windows") or judged["tokens"] // (line["seq_len"] - 1)
    return settings_of(line) | {"windows": windows, "digest": judged.get("digest")}


def print_results(name: str, settings: dict, results: Results) -> None:
    text = results.text
    content = f" ({settings['digest']})" if settings["digest"] else ""
    dense = results.of("dense", "-", 0.0, "-")
    tokens = max(line["texts"][text]["tokens"] for line in results.lines)
    commits = dict.fromkeys(line.get("commit") or "unknown" for line in results.lines)
    print(
        f"### {name}\n\nDense {shown(dense)}; {described(settings)}, perplexity on "
        f"{tokens:,} tokens of {text}{content}. Commit {', '.join(commits)}.\n\n"
        f"{table(results)}\n\n{others_table(results)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--eval-text", type=Path, nargs="+")
    parser.add_argument("--allocators", nargs="+", default=["owl", "alpha_pruning"])
    parser.add_argument("--pruners", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6, 0.7])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["dense", "uniform", "atp", "base", "paper", "ours"],
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--eval-seq-len", type=int, nargs="+", default=[])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", type=Path, nargs="+", default=[])
    parser.add_argument("--limit", type=int, help="first items of every task")
    parser.add_argument(
        "--cache", type=Path, help="profile_cache: one allocation serves both pruners"
    )
    parser.add_argument("--out", type=Path, nargs="+", required=True)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    names = [path.name for path in options.eval_text or []]
    if len(set(names)) < len(names):
        parser.error("--eval-text: give files of different names, which tables go by")

    done = read_lines(options.out)
    if not options.table:
        keep_freed_memory()
        SIGNALS["random"] = RandomSlopes
        logging.disable(logging.WARNING)
        logger.remove()
        logger.add(sys.stderr, level="WARNING")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        texts = {
            name: evaluation_windows(
                read_text(path), tokenizer, length, options.windows
            )
            for name, (path, length) in eval_texts(options).items()
        }
        tasks = encode_tasks(
            read_tasks(options.tasks, options.limit),
            tokenizer,
            AutoConfig.from_pretrained(options.model),
        )
        missing, kept = to_run(cells(options), serving(options, tasks, done))
        if said := other_code(kept, code_version()):
            print(said, file=sys.stderr)
        for cell in missing:
            line = run(cell, options, tokenizer, texts, tasks)
            done.append(line)
            append(line, options.out[0])
            print(json.dumps(line), file=sys.stderr, flush=True)
    print_tables(done)


if __name__ == "__main__":
    main()
