"""`absorb eval`."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from helpers.cli import absorb, error_of
from helpers.words import make_model, make_tokenizer, words
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin.cli import compare, evaluate
from absorb_plugin.evaluation.compare import Run, read_runs
from absorb_plugin.evaluation.perplexity import perplexity
from absorb_plugin.evaluation.text import evaluation_windows


def test_eval_json_is_the_only_thing_on_stdout(model_dir, text_file):
    command = [sys.executable, "-m", "absorb_plugin.cli", "eval", str(model_dir)]
    options = ["--text", str(text_file), "--seq-len", "16", "--windows", "5", "--json"]
    environment = {**os.environ, "LLM_COMPRESSOR_LOG_LEVEL": "DEBUG"}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    windows = evaluation_windows([text_file.read_text()], tokenizer, 16, 5)
    assert all(window[0] == tokenizer.bos_token_id for window in windows)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    value, tokens = perplexity(model, windows, progress=False)
    assert result == {"perplexity": pytest.approx(value, rel=1e-6), "tokens": tokens}
    assert tokens == 5 * 15


def test_eval_for_people(model_dir, text_file):
    result = absorb("eval", model_dir, "--text", text_file, "--seq-len", 32)
    assert result.exit_code == 0, result.output
    windows = 400 // 31
    assert re.fullmatch(
        rf"Perplexity \d+\.\d+ over {windows * 31} tokens\n", result.stdout
    )


def test_names_with_brackets_are_shown_whole():
    """rich takes [b] for a style."""
    one = {"acc": 0.5, "acc_norm": None, "stderr": None, "n": 1}
    with io.StringIO() as file:
        evaluate._print({"a[b]": one}, file)
        assert "a[b]" in file.getvalue()
    run = Run("r", allocation="x[b]", tasks={"a[b]": one})
    with io.StringIO() as file:
        compare._print([run], file)
        assert "a[b]" in file.getvalue() and "x[b]" in file.getvalue()


def test_a_perplexity_beyond_the_largest_float(text_file, tmp_path):
    model = make_model()
    model.lm_head.weight.data *= 1e6
    for part in (model, make_tokenizer(bos=True)):
        part.save_pretrained(tmp_path / "model")
    out = tmp_path / "eval.json"
    options = ["--text", text_file, "--seq-len", 32, "--out", out]
    result = absorb("eval", tmp_path / "model", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Perplexity beyond 1e308 over ")
    assert json.loads(out.read_text())["perplexity"] is None
    result = absorb("eval", tmp_path / "model", *options, "--json")
    assert json.loads(result.stdout)["perplexity"] is None
    assert absorb("compare", out, "--figure", tmp_path / "a.png").exit_code == 0


def test_eval_of_a_dataset(model_dir, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": words(40)}) + "\n")
    result = absorb("eval", model_dir, "--dataset", tmp_path, "--seq-len", 16, "--json")
    assert json.loads(result.stdout)["tokens"] == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "missing.txt"}, "missing.txt: no such text file"),
        ({"--seq-len": "65"}, "longer than the model's 64 positions"),
        ({"--windows": "1000"}, "the text is too short: 1000 windows of 16 tokens"),
        ({"--dataset": "wikitext"}, "not both"),
        ({"--split": "train"}, "--split train: a file has no splits"),
    ],
)
def test_eval_errors(model_dir, text_file, change, message):
    options = {"--text": text_file, "--seq-len": 16, **change}
    flat = [item for option in options.items() for item in option]
    assert message in error_of("eval", model_dir, *flat, "--json")


def test_no_such_model(text_file, tmp_path):
    missing = tmp_path / "model"
    line = error_of("eval", missing, "--text", text_file)
    assert line == f"error: {missing}: no such model directory"


def test_tokenizer_without_bos(text_file, tmp_path):
    make_model().save_pretrained(tmp_path)
    make_tokenizer(bos=False).save_pretrained(tmp_path)
    result = absorb("eval", tmp_path, "--text", text_file, "--seq-len", 16, "--json")
    assert json.loads(result.stdout)["tokens"] == 400 // 16 * 15


def test_eval_of_tasks(model_dir, text_file, tmp_path):
    row = {"query": words(5), "choices": ["word1", "word2 word3"], "gold": 0}
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    tasks = ["--tasks", tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    result = absorb("eval", model_dir, *tasks, "--limit", 2, "--json")
    assert result.exit_code == 0, result.output
    alone = json.loads(result.stdout)
    assert alone.keys() == {"one", "two"}
    assert alone["one"].keys() == {"acc", "acc_norm", "stderr", "n"}
    assert alone["one"]["n"] == 2

    out = tmp_path / "eval.json"
    text = ["--text", text_file, "--seq-len", 16, "--windows", 2]
    both = absorb("eval", model_dir, *tasks, *text, "--out", out, "--json")
    told = json.loads(both.stdout)
    assert told.keys() == {"perplexity", "tokens", "one", "two"}
    assert told["one"]["n"] == 3
    saved = json.loads(out.read_text())
    assert saved == {"model": str(model_dir), "sparsity": 0.0, **told}
    assert read_runs([tmp_path])[0].tasks["two"] == told["two"]

    people = absorb("eval", model_dir, *tasks, *text)
    assert re.match(r"Perplexity \d+\.\d+ over 30 tokens\n", people.stdout)
    assert "acc_norm" in people.stdout and "one" in people.stdout


def test_eval_errors_come_before_the_model(model_dir, tmp_path):
    (model_dir / "model.safetensors").rename(tmp_path / "hidden")
    try:
        bad = tmp_path / "bad.jsonl"
        bad.write_text(json.dumps({"query": "a", "choices": ["b", "c"]}) + "\n")
        line = error_of("eval", model_dir, "--tasks", bad)
        assert "bad.jsonl, line 1: field `gold`" in line
        assert "give --text, --dataset or --tasks" in error_of("eval", model_dir)
        assert "after --tasks" in error_of("eval", model_dir, bad)
        line = error_of("eval", model_dir, "--tasks", bad, "--out", tmp_path)
        assert "--out" in line and "is a directory" in line
    finally:
        (tmp_path / "hidden").rename(model_dir / "model.safetensors")
