"""
Zero-shot accuracies of `absorb eval` and of lm-evaluation-harness on the same items.

    pip install -c constraints.txt -e ".[eval]"
    python integration/zero_shot_lm_eval.py MODEL --tasks FILE.jsonl... [--limit 200]

The files are those of `absorb eval --tasks` (rows without choices as `context` and
`continuation`). A task definition (YAML) for the harness is made from each, and
`simple_evaluate` runs on the saved model without a network. Both sides compute in
--dtype (float32). Printed per task: both accuracies, the number of items that the two
judge differently, and the largest difference between their log-likelihoods of one
candidate. The exit code is 1 if two log-likelihoods are further apart than rounding
explains, or an item is judged differently although its best candidates are.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin.evaluation.tasks import (
    Score,
    accuracy,
    encode_tasks,
    loglikelihoods,
    read_tasks,
)

PACKAGES = ("absorb-plugin", "lm_eval", "transformers", "tokenizers", "torch")
# Two float32 sums of one log-likelihood in different order; nats.
TOLERANCE = 1e-2

FORMS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    },
    "contexts": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",  # a number: the choices are contexts
        "doc_to_choice": "contexts",
        "doc_to_target": "continuation",
    },
    "context": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + continuation}}",
    },
}


def write_task(folder: Path, name: str, rows: list[dict]) -> None:
    """One YAML and one file of items, as a user of the harness would write them."""
    form = next(form for form in FORMS if form in rows[0])  # one per file here
    items = folder / f"{name}.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = ["acc", "acc_norm"] if form == "choices" else ["acc"]
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": " ",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        **FORMS[form],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))


def run_harness(options: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """The harness's results, and its samples in the order of the items."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        for path in options.tasks:
            lines = path.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
            write_task(Path(folder), path.stem, rows[: options.limit])
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": options.model, "dtype": options.dtype},
            tasks=names,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            batch_size=options.batch_size,
            device=options.device,
            bootstrap_iters=0,
        )
    assert found is not None
    for samples in found["samples"].values():
        samples.sort(key=lambda sample: sample["doc_id"])
    return found


def differences(
    item: Any, ours: list[Score], theirs: list[tuple[float, bool]]
) -> tuple[bool, bool, float]:
    """
    :return: judged differently; beyond rounding; largest difference in nats
    """
    sums = [score.logprob for score in ours]
    other = [float(logprob) for logprob, _ in theirs]
    gap = max(abs(a - b) for a, b in zip(sums, other, strict=True))
    if item.gold is None:
        differs = ours[0].greedy != bool(theirs[0][1])
        return differs, False, gap
    best, also = sums.index(max(sums)), other.index(max(other))
    return best != also, abs(sums[best] - sums[also]) > TOLERANCE, gap


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tasks", nargs="+", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    tasks = read_tasks(options.tasks, options.limit)
    harness = run_harness(options, [task.name for task in tasks])
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    ).to(options.device)
    failed = False
    print("| task | items | acc | lm_eval | acc_norm | lm_eval | differ | nats |")
    print("|---|---|---|---|---|---|---|---|")
    for encoded in encode_tasks(tasks, tokenizer, model.config):
        task = encoded.task
        flat = [request for item in encoded.requests for request in item]
        scores = iter(loglikelihoods(model, flat, options.batch_size, task.name))
        ours = [[next(scores) for _ in item.pairs] for item in task.items]
        samples = harness["samples"][task.name]
        judged = [
            differences(item, mine, sample["filtered_resps"])
            for item, mine, sample in zip(task.items, ours, samples, strict=True)
        ]
        result, theirs = accuracy(task, ours), harness["results"][task.name]
        norm, their_norm = result.acc_norm, theirs.get("acc_norm,none")
        print(
            f"| {task.name} | {result.n} | {result.acc:.4f} | "
            f"{theirs['acc,none']:.4f} | {'' if norm is None else f'{norm:.4f}'} | "
            f"{'' if their_norm is None else f'{their_norm:.4f}'} | "
            f"{sum(one[0] for one in judged)} | {max(one[2] for one in judged):.1e} |"
        )
        failed |= any(one[1] for one in judged) or max(j[2] for j in judged) > TOLERANCE
    print("\n" + ", ".join(f"{package} {version(package)}" for package in PACKAGES))
    print(f"Python {platform.python_version()}, {options.dtype} on {options.device}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
