"""Zero-shot tasks against a naive reference: one candidate at a time, in float64."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from compressed_tensors.offload import set_onload_device
from helpers import tiny
from helpers.words import make_tokenizer, words
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from absorb_plugin.evaluation import tasks
from absorb_plugin.evaluation.perplexity import (
    linear_sparsity,
    perplexity,
    sparsity_if_known,
)
from absorb_plugin.evaluation.tasks import (
    Request,
    TaskResult,
    encode_tasks,
    evaluate_tasks,
    loglikelihoods,
    read_tasks,
)

# One, two and many tokens per choice, shared and unequal contexts.
ROWS: list[dict[str, Any]] = [
    {"query": words(9, 1), "choices": ["word1", "word2 word3", "word4"], "gold": 1},
    {"query": words(4, 2), "choices": [words(k, k) for k in (6, 1, 2)], "gold": 0},
    {"query": words(5, 3) + "  ", "choices": ["word7", "word8"], "gold": 1, "id": "x"},
    {"query": "", "choices": ["word9 word1", "word10", "word11"], "gold": 2},
    {"query": words(8, 4), "choices": [f"word{k}" for k in range(20, 30)], "gold": 3},
    {"contexts": [words(3, 5), words(7, 6)], "continuation": words(2, 7), "gold": 1},
    {"contexts": [words(3, 8), words(2, 9)], "continuation": "word5", "gold": 0},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    return write(tmp_path / "task.jsonl", ROWS)


def naive_sum(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    context: str,
    continuation: str,
) -> float:
    """Word level: the tokens of a continuation are those of its words."""
    before = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
    ids = before + tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return sum(
        float(logits[i - 1, ids[i]] - torch.logsumexp(logits[i - 1], 0))
        for i in range(len(before), len(ids))
    )


def naive_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[bool], list[bool]]:
    """Per row: right by the sum, right by the sum per character."""
    by_sum, by_length = [], []
    for row in ROWS:
        if "choices" in row:
            pairs = [(row["query"], choice) for choice in row["choices"]]
        else:
            pairs = [(context, row["continuation"]) for context in row["contexts"]]
        sums = [naive_sum(model, tokenizer, *pair) for pair in pairs]
        normed = [x / len(text) for x, (_, text) in zip(sums, pairs, strict=True)]
        by_sum.append(max(range(len(sums)), key=sums.__getitem__) == row["gold"])
        by_length.append(max(range(len(sums)), key=normed.__getitem__) == row["gold"])
    return by_sum, by_length


def scores_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    batch_size: int,
) -> list[float]:
    (encoded,) = encode_tasks(read_tasks([path]), tokenizer, model.config)
    flat = [request for item in encoded.requests for request in item]
    return [score.logprob for score in loglikelihoods(model, flat, batch_size)]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_scores_and_accuracy_of_every_architecture(
    task_file: Path, architecture: str, bos: bool
) -> None:
    model, tokenizer = tiny.make_model(architecture), make_tokenizer(bos)
    expected = [
        naive_sum(model, tokenizer, context, continuation)
        for item in read_tasks([task_file])[0].items
        for context, continuation in item.pairs
    ]
    for batch_size in (1, 3, 100):
        found = scores_of(model, tokenizer, task_file, batch_size)
        assert found == pytest.approx(expected, abs=2e-4)

    by_sum, by_length = naive_accuracy(model, tokenizer)
    encoded = encode_tasks(read_tasks([task_file]), tokenizer, model.config)
    result = evaluate_tasks(model, encoded, batch_size=4, progress=False)["task"]
    n, p = len(ROWS), sum(by_sum) / len(ROWS)
    assert result.n == n
    assert result.acc == pytest.approx(p)
    assert result.acc_norm == pytest.approx(sum(by_length) / n)
    assert result.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))


def test_the_two_accuracies_differ(tmp_path: Path, llama: PreTrainedModel) -> None:
    """A long choice loses by its sum and wins by the character, or the gold is idle."""
    row = {"query": "word1", "choices": ["word2", words(8, 1)], "gold": 1}
    encoded = encode_tasks(
        read_tasks([write(tmp_path / "t.jsonl", [row])]),
        make_tokenizer(True),
        llama.config,
    )
    result = evaluate_tasks(llama, encoded, progress=False)["t"]
    assert result == TaskResult(acc=0.0, acc_norm=1.0, stderr=None, n=1)


@pytest.mark.parametrize("gold", [0, None])
def test_scores_that_are_no_numbers_are_no_answer(gold: int | None) -> None:
    task = tasks.Task("t", Path("t.jsonl"), (tasks.Item((("a", " b"),), gold, 3),))
    with pytest.raises(ValueError, match="line 3: the model's logits are not numbers"):
        tasks.accuracy(task, [[tasks.Score(math.nan, False)]])


def test_a_tokenizer_without_a_first_token(
    tmp_path: Path, llama: PreTrainedModel
) -> None:
    """It is needed where a context is empty, and nowhere else."""
    tokenizer = make_tokenizer(False)
    tokenizer.bos_token = tokenizer.eos_token = None
    row = {"query": "word1", "choices": ["word2", "word3"], "gold": 1}
    encode_tasks(
        read_tasks([write(tmp_path / "t.jsonl", [row])]), tokenizer, llama.config
    )
    empty = read_tasks([write(tmp_path / "u.jsonl", [row | {"query": ""}])])
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        encode_tasks(empty, tokenizer, llama.config)


def test_greedy_rows(tmp_path: Path, llama: PreTrainedModel) -> None:
    tokenizer = make_tokenizer(True)
    context = words(6, 3)
    llama.lm_head.weight.data[:3] = 0
    ids = tokenizer(context)["input_ids"]
    for _ in range(2):
        with torch.no_grad():
            logits = llama(torch.tensor([ids])).logits[0, -1]
        logits[:3] = -1e9  # special tokens have no text
        ids.append(int(logits.argmax()))
    greedy = tokenizer.decode(ids[-2:])
    first = greedy.split()[0]
    other = "word1" if first != "word1" else "word2"
    rows = [
        {"context": context, "continuation": greedy},
        {"query": context, "continuation": first},
        {"query": context, "continuation": f"{first} {first} {other}"},
        {"query": context, "continuation": f"{other} {greedy.split()[1]}"},
    ]
    encoded = encode_tasks(
        read_tasks([write(tmp_path / "lambada.jsonl", rows)]), tokenizer, llama.config
    )
    result = evaluate_tasks(llama, encoded, progress=False)["lambada"]
    error = math.sqrt(0.25 / 3)
    assert result == TaskResult(0.5, None, pytest.approx(error), 4)


def test_padding_does_not_matter_nor_the_batch(llama: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = [2, 30, 7, 3, 19, 11, 2]
    requests = [
        Request(
            tuple(torch.randint(3, 63, (n,), generator=generator).tolist()),
            scored=max(1, n // 3),
        )
        for n in lengths
    ]
    alone = [loglikelihoods(llama, [request])[0].logprob for request in requests]
    for batch_size in (2, 3, 7):
        scores = loglikelihoods(llama, requests, batch_size)
        assert [s.logprob for s in scores] == pytest.approx(alone, abs=1e-5)


def test_sequences_that_are_the_same_run_once(
    task_file: Path, llama: PreTrainedModel
) -> None:
    batches: list[int] = []
    hook = llama.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(len(kwargs["input_ids"])),
        with_kwargs=True,
    )
    scores_of(llama, make_tokenizer(True), task_file, 4)
    hook.remove()
    # 25 candidates; rows 0, 2 and 3 share one and 4 ten contexts with one token behind
    assert sum(batches) == 25 - 1 - 1 - 1 - 9
    assert max(batches) == 4


def test_only_the_logits_that_are_wanted_are_made(
    tmp_path: Path, llama: PreTrainedModel
) -> None:
    row = {"query": words(40, 1), "choices": ["word1", "word2 word3"], "gold": 0}
    shapes: list[int] = []
    hook = llama.lm_head.register_forward_hook(
        lambda _, __, output: shapes.append(output.shape[1])
    )
    path = write(tmp_path / "t.jsonl", [row])
    scores_of(llama, make_tokenizer(True), path, 8)
    hook.remove()
    assert shapes == [2]


@pytest.mark.parametrize("rows", [1, 3])
def test_softmax_over_few_rows(
    task_file: Path,
    llama: PreTrainedModel,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = scores_of(llama, make_tokenizer(True), task_file, 8)
    monkeypatch.setattr(tasks, "ROWS", rows)
    assert scores_of(llama, make_tokenizer(True), task_file, 8) == pytest.approx(whole)


def test_softmax_is_float32_for_16_bit_models(
    task_file: Path, llama: PreTrainedModel
) -> None:
    model, tokenizer = llama.to(torch.bfloat16), make_tokenizer(True)
    pairs = [p for item in read_tasks([task_file])[0].items for p in item.pairs]
    expected = [naive_sum(model, tokenizer, *pair) for pair in pairs]
    # one sequence at a time: bfloat16 itself depends on the shape of the batch
    found = scores_of(model, tokenizer, task_file, 1)
    assert found == pytest.approx(expected, rel=1e-2)
    assert len(set(found)) == len(found)  # bfloat16 sums would collide


@pytest.mark.parametrize("kind", ["accelerate", "compressed_tensors"])
def test_offloaded_models(task_file: Path, llama: PreTrainedModel, kind: str) -> None:
    llama.model.layers[0].mlp.gate_proj.weight.data[:24].zero_()
    expected = scores_of(llama, make_tokenizer(True), task_file, 4)
    windows = [list(range(3, 40))]
    value, _ = perplexity(llama, windows, progress=False)
    sparsity = linear_sparsity(llama)
    if kind == "accelerate":
        cpu_offload(llama, torch.device("cpu"))
        assert llama.model.layers[0].mlp.gate_proj.weight.is_meta
    else:
        set_onload_device(llama, torch.device("cpu"))
    found = scores_of(llama, make_tokenizer(True), task_file, 4)
    assert found == pytest.approx(expected, abs=1e-5)
    assert linear_sparsity(llama) == sparsity > 0
    assert perplexity(llama, windows, progress=False)[0] == pytest.approx(value)


def test_the_left_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny.make_model("llama"), make_tokenizer(True)
    query, choices = words(100, 1), ["word1 word2", "word3"]
    row = {"query": query, "choices": choices, "gold": 0}
    path = write(tmp_path / "t.jsonl", [row])
    (encoded,) = encode_tasks(read_tasks([path]), tokenizer, model.config)
    (requests,) = encoded.requests
    ids = tokenizer(query, add_special_tokens=False)["input_ids"]
    ends = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in choices]
    # 64 positions, and the last token is not read
    assert requests[0] == Request((*ids[-63:], *ends[0]), 2)
    assert requests[1] == Request((*ids[-64:], *ends[1]), 1)
    scores = loglikelihoods(model, requests)
    with torch.no_grad():
        logits = model(torch.tensor([ids[-64:]])).logits[0, -1].double()
    expected = float(logits.log_softmax(0)[ends[1][0]])
    assert scores[1].logprob == pytest.approx(expected, abs=1e-5)


class Merging:
    """A tokenizer whose blanks belong to the word behind: " a" is one token."""

    bos_token_id = None
    eos_token_id = 9
    model_max_length = 10**30
    pieces = {"": [], "a": [1], "a b": [1, 2], "a  b": [1, 3, 2], "q": [5], "q b": [5]}

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": self.pieces[texts]}
        return {"input_ids": [self.pieces[text] for text in texts]}


def test_blanks_at_the_end_of_a_context_go_to_the_continuation(
    tmp_path: Path, llama: PreTrainedModel
) -> None:
    rows = [
        {"query": "a", "choices": ["b", "b"], "gold": 0},
        {"query": "a ", "choices": ["b", "b"], "gold": 0},
    ]
    path = write(tmp_path / "t.jsonl", rows)
    (encoded,) = encode_tasks(read_tasks([path]), Merging(), llama.config)
    assert encoded.requests[0][0] == Request((1, 2), 1)
    assert encoded.requests[1][0] == Request((1, 3, 2), 2)


def test_a_continuation_without_a_token(tmp_path: Path, llama: Any) -> None:
    row = {"query": "q", "choices": ["b", "b"], "gold": 0}
    path = write(tmp_path / "t.jsonl", [row])
    with pytest.raises(ValueError, match=r"t\.jsonl, line 1: ' b' adds no token"):
        encode_tasks(read_tasks([path]), Merging(), llama.config)


def test_a_continuation_longer_than_the_model(tmp_path: Path, llama: Any) -> None:
    row = {"query": "word1", "continuation": words(65)}
    path = write(tmp_path / "t.jsonl", [row])
    with pytest.raises(ValueError, match="line 1: .* has 65 tokens, more than .* 64 p"):
        encode_tasks(read_tasks([path]), make_tokenizer(True), llama.config)


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "not a JSON object"),
        ({"text": "x"}, "no field `choices`, `contexts` or `continuation`.* text"),
        ({**GOOD, "gold": 2}, "field `gold`: 2 is no index of 2 candidates"),
        ({**GOOD, "gold": -1}, "field `gold`: -1 is no index"),
        ({**GOOD, "gold": "0"}, "field `gold`: .*integer"),
        ({**GOOD, "gold": True}, "field `gold`: .*integer"),
        ({"query": "q", "choices": ["a", "b"]}, "field `gold`: Field required"),
        ({"choices": ["a", "b"], "gold": 0}, "field `query`: Field required"),
        ({**GOOD, "query": None}, "field `query`: .*string"),
        ({**GOOD, "choices": "ab"}, "field `choices`: .*list"),
        ({**GOOD, "choices": ["a"]}, "field `choices`: .*at least 2"),
        ({**GOOD, "choices": ["a", 3]}, r"field `choices\[1\]`: .*string"),
        ({**GOOD, "choices": ["a", ""]}, r"field `choices\[1\]`: .*at least 1"),
        ({"contexts": ["a", "b"], "gold": 0}, "field `continuation`: Field required"),
        ({"continuation": "a"}, "field `query`: Field required"),
        ({"query": "q", "continuation": ""}, "field `continuation`: .*at least 1"),
    ],
)
def test_bad_rows(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", [GOOD, row])
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: {message}"):
        read_tasks([path])


def test_bad_files(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [GOOD])
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such task file"):
        read_tasks([good, tmp_path / "none.jsonl"])
    with pytest.raises(ValueError, match="is not a file"):
        read_tasks([tmp_path])
    with pytest.raises(ValueError, match="holds no rows"):
        read_tasks([write(tmp_path / "empty.jsonl", [])])
    (tmp_path / "sub").mkdir()
    twin = write(tmp_path / "sub" / "good.jsonl", [GOOD])
    with pytest.raises(ValueError, match="would both be the task 'good'"):
        read_tasks([good, twin])
    again = tmp_path / "sub" / ".." / "good.jsonl"
    with pytest.raises(ValueError, match="good.jsonl is given twice: leave one out"):
        read_tasks([good, again])
    with pytest.raises(ValueError, match="another key of the result"):
        read_tasks([write(tmp_path / "tokens.jsonl", [GOOD])])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": ')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: not JSON"):
        read_tasks([bad])
    bad.write_bytes(b'{"query": "\xff"}\n')
    with pytest.raises(ValueError, match="cannot read .*bad.jsonl as UTF-8"):
        read_tasks([bad])


def test_half_a_letter(tmp_path: Path) -> None:
    row = {"query": "a", "choices": ["b", "c \ud83d"], "gold": 0}
    path = write(tmp_path / "t.jsonl", [row])
    told = r"t.jsonl, line 1: field `choices`: '\\ud83d' at character 3 is half of"
    with pytest.raises(ValueError, match=told):
        read_tasks([path])


def test_a_byte_order_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    content = "\r\n".join([json.dumps(GOOD), "", json.dumps(GOOD)])
    path.write_bytes(content.encode("utf-8-sig"))
    (task,) = read_tasks([path])
    assert [item.line for item in task.items] == [1, 3]


def test_limit_takes_the_first_items_and_checks_them_all(tmp_path: Path) -> None:
    rows = [{**GOOD, "query": f"q{i}"} for i in range(5)]
    path = write(tmp_path / "t.jsonl", rows)
    path.write_text("\n" + path.read_text())  # blank lines are no rows
    (task,) = read_tasks([path], limit=2)
    assert [item.pairs[0][0] for item in task.items] == ["q0", "q1"]
    assert [item.line for item in task.items] == [2, 3]
    write(path, [*rows, {**GOOD, "gold": 7}])
    with pytest.raises(ValueError, match="line 6"):
        read_tasks([path], limit=2)


def test_logits_that_are_not_numbers(task_file: Path, llama: PreTrainedModel) -> None:
    llama.lm_head.weight.data[5] = float("nan")
    encoded = encode_tasks(read_tasks([task_file]), make_tokenizer(True), llama.config)
    with pytest.raises(ValueError, match=r"task\.jsonl, line 1: .*not numbers"):
        evaluate_tasks(llama, encoded, progress=False)


def test_the_mode_is_kept_and_progress_goes_to_stderr(
    task_file: Path, llama: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded = encode_tasks(read_tasks([task_file]), make_tokenizer(True), llama.config)
    evaluate_tasks(llama.train(), encoded)
    assert llama.training
    captured = capsys.readouterr()
    assert captured.out == "" and "task" in captured.err


def test_packed_weights_have_no_known_sparsity(llama: PreTrainedModel) -> None:
    assert sparsity_if_known(llama) == 0
    del llama.model.layers[0].mlp.gate_proj.weight
    assert sparsity_if_known(llama) is None
