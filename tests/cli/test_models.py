"""Every command that loads a model, with models and texts as people have them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.cli import absorb, error_of
from helpers.words import make_model, make_tokenizer, words
from transformers import AutoModelForImageTextToText

COMMANDS: dict[str, list[Any]] = {
    "eval": [],
    "prune": ["--samples", 4],
    "allocate": ["--samples", 4, "--allocator", "owl", "--sparsity", 0.5],
    "noise": ["--samples", 2, "--eta", 0.1],
}


@pytest.fixture
def arguments(text_file: Path, wanda_recipe: Path, tmp_path: Path):
    """Of a command that would run."""

    def of(command: str, model: Path, *more: object, text: Path = text_file) -> list:
        options = [*COMMANDS[command], "--seq-len", 16, "--text", text, *more]
        if command == "prune":
            options += ["--recipe", wanda_recipe, "--out", tmp_path / "out"]
        return [command, model, *options]

    return of


@pytest.mark.parametrize("command", COMMANDS)
def test_a_head_of_random_numbers(command: str, arguments, tmp_path: Path) -> None:
    make_model().model.save_pretrained(tmp_path / "headless")
    make_tokenizer(bos=True).save_pretrained(tmp_path / "headless")
    message = error_of(*arguments(command, tmp_path / "headless"))
    assert "headless has no weights for lm_head.weight" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_sees_images(command: str, arguments, tmp_path: Path) -> None:
    """Of a kind that AutoModelForCausalLM does not know."""
    model = tiny.with_images("llava")
    model.save_pretrained(tmp_path / "llava")
    make_tokenizer(bos=True).save_pretrained(tmp_path / "llava")
    (tmp_path / "llava" / "processor_config.json").write_text('{"patch_size": 14}')
    result = absorb(*arguments(command, tmp_path / "llava"))
    assert result.exit_code == 0, result.output
    if command == "prune":
        out = tmp_path / "out"
        assert (out / "processor_config.json").read_text() == '{"patch_size": 14}'
        pruned = AutoModelForImageTextToText.from_pretrained(out).state_dict()
        for name, own in model.state_dict().items():
            of_blocks = "language_model.layers" in name and "proj.weight" in name
            assert torch.equal(own, pruned[name]) != of_blocks, name


@pytest.mark.parametrize("command", COMMANDS)
def test_code_of_the_model(
    command: str, arguments, model_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "remote"))
    (folder / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MyConfig(LlamaConfig):\n"
        "    model_type = 'my_lm'\n"
        "class MyModel(LlamaForCausalLM):\n"
        "    config_class = MyConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    files = {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"}
    config |= {"model_type": "my_lm", "architectures": ["MyModel"], "auto_map": files}
    (folder / "config.json").write_text(json.dumps(config))
    assert "--trust-remote-code" in error_of(*arguments(command, folder))
    result = absorb(*arguments(command, folder, "--trust-remote-code"))
    assert result.exit_code == 0, result.output
    if command == "prune":  # the code comes along
        again = absorb(*arguments("eval", tmp_path / "out", "--trust-remote-code"))
        assert again.exit_code == 0, again.output


@pytest.mark.parametrize("command", COMMANDS)
def test_columns_and_chats(command: str, arguments, model_dir, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "chatty"))
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    turns = [{"role": "user", "content": words(200)}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"turns": turns}, {"turns": turns}]))
    assert "--text-column" in error_of(*arguments(command, folder, text=path))
    result = absorb(*arguments(command, folder, "--text-column", "turns", text=path))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_length_that_does_not_fit(command: str, arguments, model_dir: Path) -> None:
    message = error_of(*arguments(command, model_dir, "--seq-len", 65))
    assert "--seq-len 65 is longer than the model's 64 positions" in message
