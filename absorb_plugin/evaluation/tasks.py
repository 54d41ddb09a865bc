"""
Zero-shot tasks: rows of JSON lines in, accuracies out.

A row is in one of three forms; other fields are ignored:

- `query`, `choices`, `gold`: the score of a choice is the log-likelihood of " " +
  choice behind the query; the highest is the answer, `gold` the index of the right one.
- `contexts`, `continuation`, `gold`: partial evaluation, as in WinoGrande: the score of
  a context is the log-likelihood of " " + continuation behind it.
- `query` (or `context`), `continuation`: as in LAMBADA: right if greedy decoding
  gives " " + continuation, token by token.

Tokens, scores and accuracies are defined as lm-evaluation-harness defines them;
docs/evaluation.md has a comparison on the same items.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from loguru import logger
from pydantic import BaseModel, Field, StrictInt, StrictStr, ValidationError
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from absorb_plugin.evaluation.perplexity import ROWS, input_device
from absorb_plugin.evaluation.text import Tokenizer, prefix_ids
from absorb_plugin.files import check_letters, json_object
from absorb_plugin.language_model import check_largest_id
from absorb_plugin.search.standard_error import standard_error

__all__ = [
    "EncodedTask",
    "Item",
    "Request",
    "Score",
    "Task",
    "TaskResult",
    "accuracy",
    "encode_tasks",
    "evaluate_tasks",
    "loglikelihoods",
    "read_tasks",
]

# A tokenizer without a limit says so with an absurd one.
NO_LIMIT = 10**9
# Keys that stand beside the tasks in the result of `absorb eval`.
RESERVED = ("model", "perplexity", "sparsity", "tokens")
# Fields that hold texts.
TEXTS = {"query", "context", "choices", "contexts", "continuation"}

Text = Annotated[StrictStr, Field(min_length=1)]


class _Choices(BaseModel):
    query: StrictStr
    choices: list[Text] = Field(min_length=2)
    gold: StrictInt


class _Contexts(BaseModel):
    contexts: list[StrictStr] = Field(min_length=2)
    continuation: Text
    gold: StrictInt


class _Greedy(BaseModel):
    query: StrictStr
    continuation: Text


@dataclass(frozen=True)
class Item:
    """
    One row of a task.

    :param pairs: (context, continuation) for each candidate
    :param gold: index of the right candidate; None for a greedy match of the only one
    :param line: number in the file, from 1
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int | None
    line: int


@dataclass(frozen=True)
class Task:
    """
    :param name: stem of the file
    """

    name: str
    path: Path
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Request:
    """
    :param tokens: context and continuation, cut on the left to what the model can see
    :param scored: tokens of the continuation, at least 1
    """

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class EncodedTask:
    """
    :param requests: per item, per candidate
    """

    task: Task
    requests: tuple[tuple[Request, ...], ...]


@dataclass(frozen=True)
class Score:
    """
    :param logprob: log-likelihood of the continuation, summed over its tokens [nats]
    :param greedy: whether every token of it is the most likely one
    """

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class TaskResult:
    """
    :param acc: share of items whose right candidate has the highest sum, or is greedy
    :param acc_norm: the same with sums divided by the characters of the choice; None
        where a row has but one candidate
    :param stderr: standard error of `acc`; None for one item
    :param n: items
    """

    acc: float
    acc_norm: float | None
    stderr: float | None
    n: int


def read_tasks(paths: Sequence[Path], limit: int | None = None) -> list[Task]:
    """
    Read and check every row of every file.

    :param paths: JSON lines
    :param limit: keep the first so many items of each task
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: naming file, line and field of the first row that is wrong; or
        if a file is empty, two have one name, or one has a reserved name
    """
    tasks: dict[str, Task] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such task file")
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        if path.stem in tasks and path.samefile(tasks[path.stem].path):
            raise ValueError(f"{path} is given twice: leave one out")
        if path.stem in tasks:
            raise ValueError(
                f"{tasks[path.stem].path} and {path} would both be the task "
                f"{path.stem!r}; rename one of them"
            )
        if path.stem in RESERVED:
            raise ValueError(
                f"{path}: the task would be called {path.stem!r}, which is "
                "another key of the result; rename the file"
            )
        items = tuple(_read_items(path))
        if not items:
            raise ValueError(f"{path} holds no rows")
        tasks[path.stem] = Task(path.stem, path, items[:limit])
    return list(tasks.values())


def _read_items(path: Path) -> Iterator[Item]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _read_item(line, number, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path} as UTF-8 text: {error}") from error


def _read_item(text: str, line: int, where: str) -> Item:
    row = json_object(text, where)
    for field in TEXTS & row.keys():
        check_letters(row[field], f"{where}: field `{field}`")
    try:
        pairs, gold = _pairs(row, where)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(
            f"[{part}]" if isinstance(part, int) else str(part) for part in first["loc"]
        )
        raise ValueError(f"{where}: field `{field}`: {first['msg']}") from error
    if gold is not None and not 0 <= gold < len(pairs):
        raise ValueError(
            f"{where}: field `gold`: {gold} is no index of {len(pairs)} candidates, "
            f"which are numbered from 0 to {len(pairs) - 1}"
        )
    return Item(tuple((context, f" {text}") for context, text in pairs), gold, line)


def _pairs(
    row: Mapping[str, Any], where: str
) -> tuple[list[tuple[str, str]], int | None]:
    """(context, continuation without the blank) per candidate, and the right one."""
    if "choices" in row:
        choices = _Choices.model_validate(row)
        return [(choices.query, choice) for choice in choices.choices], choices.gold
    if "contexts" in row:
        contexts = _Contexts.model_validate(row)
        return [(x, contexts.continuation) for x in contexts.contexts], contexts.gold
    if "continuation" in row:
        query = {"query": row["context"]} if "context" in row else {}
        greedy = _Greedy.model_validate({**row, **query})
        return [(greedy.query, greedy.continuation)], None
    raise ValueError(
        f"{where}: no field `choices`, `contexts` or `continuation`; the fields are: "
        f"{', '.join(row) or 'none at all'}"
    )


def encode_tasks(
    tasks: Sequence[Task], tokenizer: Tokenizer, config: PretrainedConfig
) -> list[EncodedTask]:
    """
    Tokenise context and context + continuation; what the second has behind the length
    of the first is the continuation. White space at the end of the context goes to the
    continuation, as it would be one token with the word behind it.

    :param config: of the language model, for the number of its positions; longer
        requests are cut on the left
    :raises ValueError: if a continuation has no token of its own or is longer than the
        positions; the message names the file and the line
    """
    longest = _positions(config, tokenizer)
    prefix = prefix_ids(tokenizer)
    return [_encode_task(task, tokenizer, prefix, longest) for task in tasks]


def _encode_task(
    task: Task, tokenizer: Tokenizer, prefix: list[int], longest: int
) -> EncodedTask:
    pairs = [[_move_blanks(*pair) for pair in item.pairs] for item in task.items]
    flat = [pair for item in pairs for pair in item]
    ids = _ids(tokenizer, [text for a, b in flat for text in (a, a + b)])
    # Something must stand in front of the first token that is predicted.
    bare = any(not ids[context] for context, _ in flat)
    alone = prefix or ([_first_token(tokenizer)] if bare else [])
    requests, shortened = [], 0
    for item, item_pairs in zip(task.items, pairs, strict=True):
        found = []
        for context, rest in item_pairs:
            before, whole = ids[context], ids[context + rest]
            tokens = (*(prefix if before else alone), *whole)
            scored = len(whole) - len(before)
            _check_scored(scored, longest, f"{task.path}, line {item.line}", rest)
            # The last token is predicted and never read, hence one more than fits.
            found.append(Request(tokens[-(longest + 1) :], scored))
            shortened += len(tokens) > longest + 1
        requests.append(tuple(found))
    if shortened:
        logger.warning(
            f"{task.name}: {shortened} requests are longer than the model's {longest} "
            "positions and lose the beginning of their context"
        )
    return EncodedTask(task, tuple(requests))


def _move_blanks(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, list[int]]:
    """Text -> tokens without special ones; each text once, all in one call."""
    distinct = list(dict.fromkeys(texts))
    encoded = tokenizer(distinct, add_special_tokens=False, verbose=False)
    return dict(zip(distinct, encoded["input_ids"], strict=True))


def _first_token(tokenizer: Tokenizer) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "an empty context needs a token in front of the continuation, and the "
        "tokenizer has neither BOS nor EOS: give every row a context"
    )


def _check_scored(scored: int, longest: int, where: str, text: str) -> None:
    if scored < 1:
        raise ValueError(
            f"{where}: {text!r} adds no token to its context for this tokenizer, so it "
            "has no score; leave the row out"
        )
    if scored > longest:
        raise ValueError(
            f"{where}: {text[:40]!r}… has {scored} tokens, more than the model's "
            f"{longest} positions"
        )


def _positions(config: PretrainedConfig, tokenizer: Tokenizer) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    return positions or min(tokenizer.model_max_length, NO_LIMIT)


def evaluate_tasks(
    model: PreTrainedModel,
    encoded: Sequence[EncodedTask],
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, TaskResult]:
    """
    :param model: causal language model, on any device, offloaded or not
    :param batch_size: sequences per forward pass
    :param progress: show a bar per task on stderr
    :return: name of the task -> its result
    :raises ValueError: if a score is not a number
    """
    results = {}
    for one in encoded:
        flat = [request for item in one.requests for request in item]
        description = one.task.name if progress else None
        scores = iter(loglikelihoods(model, flat, batch_size, description))
        per_item = [[next(scores) for _ in item.pairs] for item in one.task.items]
        results[one.task.name] = accuracy(one.task, per_item)
    return results


def accuracy(task: Task, scores: Sequence[Sequence[Score]]) -> TaskResult:
    """
    :param scores: per item, per candidate
    """
    right, right_norm = [], []
    for item, found in zip(task.items, scores, strict=True):
        sums = np.array([score.logprob for score in found])
        if np.isnan(sums).any():
            raise ValueError(
                f"{task.path}, line {item.line}: the model's logits are not numbers, "
                "so it has no answer"
            )
        if item.gold is None:
            right.append(found[0].greedy)
            continue
        # Characters of the choice, not of the blank that was put in front of it.
        characters = [len(continuation) - 1 for _, continuation in item.pairs]
        right.append(int(sums.argmax()) == item.gold)
        right_norm.append(int((sums / characters).argmax()) == item.gold)
    n = len(right)
    error = float(standard_error(np.array(right, dtype=float), np.ones(n)))
    return TaskResult(
        acc=sum(right) / n,
        acc_norm=sum(right_norm) / n if len(right_norm) == n else None,
        stderr=error if math.isfinite(error) else None,
        n=n,
    )


@torch.no_grad()
def loglikelihoods(
    model: PreTrainedModel,
    requests: Sequence[Request],
    batch_size: int = 8,
    description: str | None = None,
) -> list[Score]:
    """
    Longest first, so that one batch holds sequences of about one length and what does
    not fit in memory fails at once. They are padded on the right: with causal
    attention no token sees the padding, whatever the model does about masks.

    :param description: of a progress bar on stderr; None for no bar
    :return: one score per request, in their order
    :raises ValueError: if the model does not know a token
    """
    check_largest_id(model, max((max(one.tokens) for one in requests), default=0))
    # Choices of one token behind one context are one sequence, which is run once.
    readers: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        readers.setdefault(request.tokens[:-1], []).append(index)
    sequences = sorted(readers, key=len, reverse=True)
    scores: dict[int, Score] = {}
    was_training = model.training
    model.eval()
    try:
        with tqdm(
            total=len(sequences), desc=description, disable=description is None
        ) as bar:
            for start in range(0, len(sequences), batch_size):
                batch = sequences[start : start + batch_size]
                wanted = {i: row for row, s in enumerate(batch) for i in readers[s]}
                scores |= _score_batch(model, batch, wanted, requests)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return [scores[index] for index in range(len(requests))]


def _score_batch(
    model: PreTrainedModel,
    batch: Sequence[tuple[int, ...]],
    wanted: Mapping[int, int],
    requests: Sequence[Request],
) -> dict[int, Score]:
    """
    :param batch: sequences, the longest first
    :param wanted: index of a request -> row of its sequence
    """
    ends = {index: len(requests[index].tokens) - 1 for index in wanted}
    first = min(ends[index] - requests[index].scored for index in wanted)
    logits = _logits(model, batch, first)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for index, row in wanted.items():
        scored = requests[index].scored
        rows += [row] * scored
        positions += range(ends[index] - scored - first, ends[index] - first)
        targets += requests[index].tokens[-scored:]
    logprobs, greedy = _token_scores(logits, rows, positions, targets)
    found, start = {}, 0
    for index in wanted:
        stop = start + requests[index].scored
        found[index] = Score(math.fsum(logprobs[start:stop]), all(greedy[start:stop]))
        start = stop
    return found


def _logits(
    model: PreTrainedModel, batch: Sequence[tuple[int, ...]], first: int
) -> torch.Tensor:
    """
    :param first: position before which no logits are needed
    :return: shape (batch, longest - first, vocabulary)
    """
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    device = input_device(model)
    # Most models can leave out the logits that nobody wants: gigabytes for a large
    # vocabulary and long contexts.
    can_cut = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    cut = {"logits_to_keep": longest - first} if can_cut else {}
    logits = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **cut
    ).logits
    return logits[:, first - longest :]


def _token_scores(
    logits: torch.Tensor,
    rows: Sequence[int],
    positions: Sequence[int],
    targets: Sequence[int],
) -> tuple[list[float], list[bool]]:
    """Log-probability of every target, and whether it is the most likely token."""
    where = torch.tensor([rows, positions, targets], device=logits.device)
    logprobs, greedy = [], []
    # Few rows at a time: the softmax is in float32, whatever the model computes in.
    for row, position, target in zip(*(index.split(ROWS) for index in where)):
        chosen = logits[row, position].float()
        logprob = chosen.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
        logprobs += logprob.tolist()
        greedy += (chosen.argmax(dim=-1) == target).tolist()
    return logprobs, greedy
