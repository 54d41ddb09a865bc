"""Checkpoints as people have them: incomplete, of another kind, larger than memory."""

import gc
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.offload import disable_onloading
from helpers import tiny
from helpers.cli import files_in
from helpers.words import make_model, make_tokenizer, words
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
)

from absorb_plugin.blocks import find_blocks
from absorb_plugin.evaluation import loading
from absorb_plugin.evaluation.loading import (
    check_length,
    check_saving,
    copy_processor,
    empty_model,
    load_config,
    load_for_pruning,
    load_model,
    load_tokenizer,
    weight_bytes,
)
from absorb_plugin.evaluation.perplexity import linear_sparsity, perplexity
from absorb_plugin.evaluation.text import evaluation_windows

LOADERS = [load_model, load_for_pruning]
TINY = {
    "vocab_size": 63,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# --- what is missing --------------------------------------------------------------


@pytest.mark.parametrize("load", LOADERS)
def test_a_checkpoint_without_its_head(load: Callable, tmp_path: Path) -> None:
    make_model().model.save_pretrained(tmp_path)
    load_config(str(tmp_path))  # names do not tell: some are wrong
    told = "has no weights for lm_head.weight .1 in all.*random numbers"
    with pytest.raises(ValueError, match=told):
        load(str(tmp_path), "auto")


@pytest.mark.parametrize("load", LOADERS)
def test_a_checkpoint_that_lacks_a_block(load: Callable, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in weights.items() if "layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.*… .9 in all"):
        load(str(folder), "auto")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt", "phi3"])
def test_tied_heads_are_no_missing_weights(
    load: Callable, architecture: str, tmp_path: Path
) -> None:
    model = tiny.make_model(architecture, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    load_config(str(tmp_path))
    loaded = load(str(tmp_path), "auto")
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight is embedding.weight
    torch.testing.assert_close(head.weight, model.get_output_embeddings().weight)


# --- what is no language model ----------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_classifiers_are_refused(tied: bool, tmp_path: Path) -> None:
    """Also with tied embeddings, of which a head could be made."""
    config = LlamaConfig(**TINY, tie_word_embeddings=tied)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    told = "LlamaForSequenceClassification, which does not predict the next token"
    with pytest.raises(ValueError, match=told):
        load_config(str(tmp_path))


def test_a_base_model_whose_head_would_be_tied(tmp_path: Path) -> None:
    tiny.make_model("llama", tie_word_embeddings=True).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved as LlamaModel, which does not predict"):
        load_config(str(tmp_path))


def test_encoders_are_refused(folder: Path, tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**TINY)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="BertForMaskedLM"):
        load_config(str(tmp_path / "bert"))
    T5Config().save_pretrained(folder)
    with pytest.raises(ValueError, match="'t5' model, of which transformers has none"):
        load_config(str(folder))


# --- files ------------------------------------------------------------------------


POINTER = "version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS.*pull"):
        load_config(str(folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytorch_model.bin", POINTER),  # git lfs pull --include "*.safetensors"
        ("consolidated.safetensors", POINTER),
        ("model.onnx", POINTER),
        # snapshot_download(ignore_patterns="*.bin")
        (
            "pytorch_model.bin.index.json",
            '{"weight_map": {"a": "pytorch-1.bin"}}',
        ),
        ("other.index.json", "{}"),
    ],
)
def test_files_that_are_not_loaded_do_not_matter(
    folder: Path, name: str, content: str
) -> None:
    (folder / name).write_text(content)
    load_config(str(folder))
    load_model(str(folder), "auto")


def test_weights_of_pytorch(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "training_args.bin")
    with pytest.raises(FileNotFoundError, match="has no weights .*pytorch_model.bin"):
        load_config(str(folder))
    torch.save(weights, folder / "pytorch_model.bin")
    load_config(str(folder))
    tiny.assert_same(tiny.snapshot(load_model(str(folder), "auto")), weights)
    (folder / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(ValueError, match="pytorch_model.bin is a pointer"):
        load_config(str(folder))


@pytest.fixture
def pickled(folder: Path) -> Path:
    """Weights as torch saves them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("part", [slice(0), slice(2000), slice(-100), slice(2, None)])
def test_weights_of_pytorch_that_are_cut(pickled: Path, part: slice) -> None:
    file = pickled / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[part])
    with pytest.raises(ValueError, match=r"model.bin \(\d+ bytes\) is damaged or cut"):
        load_config(str(pickled))


def test_weights_of_an_old_pytorch(pickled: Path) -> None:
    file = pickled / "pytorch_model.bin"
    weights = torch.load(file)
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    load_config(str(pickled))
    tiny.assert_same(tiny.snapshot(load_model(str(pickled), "auto")), weights)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RuntimeError):
        load_model(str(pickled), "auto")


@pytest.mark.parametrize("name", ["nosuch", "org/nosuch"])
def test_a_name_that_is_nowhere(
    name: str, logs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = f"'{name}' is no directory here, and as a hub id: "
    with pytest.raises(FileNotFoundError, match=told):
        load_config(name)
    assert f"{name} is no directory here, and is taken for a hub id" in logs[0]


def test_weights_that_the_config_names(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_config(str(folder))
    rewrite(folder / "config.json", transformers_weights="other.safetensors")
    load_config(str(folder))
    load_model(str(folder), "auto")


@pytest.mark.parametrize("name", ["model.bin", "", 7, "../a.safetensors", "x.json"])
def test_weights_that_transformers_refuses(folder: Path, name: object) -> None:
    rewrite(folder / "config.json", transformers_weights=name)
    told = f"config.json: transformers_weights={re.escape(repr(name))} must be a file"
    with pytest.raises(ValueError, match=told):
        load_config(str(folder))
    with pytest.raises((ValueError, AttributeError, TypeError)):  # as it does itself
        load_model(str(folder), "auto")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "{", "[]"])
def test_an_index_that_is_none(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    told = "safetensors.index.json(: not| has no object `weight_map`: download)"
    with pytest.raises(ValueError, match=told):
        load_config(str(folder))


def test_an_adapter(tmp_path: Path) -> None:
    rows = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="adapter for org/base.*merge_and_unload"):
        load_config(str(tmp_path))


def test_directories_that_are_no_models(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json: it is no model"):
        load_config(str(tmp_path / "empty"))
    with pytest.raises(NotADirectoryError, match="is a file: name the directory"):
        load_config(str(folder / "model.safetensors"))
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        load_config(str(tmp_path / "none"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_config(str(folder))


def test_a_download_that_was_cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors .* is damaged or cut"):
        load_config(str(folder))


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="50KB")
    load_config(str(tmp_path))
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    told = f"lacks 1 of . files of weights that .*index.json names: {shard.name}"
    with pytest.raises(FileNotFoundError, match=told):
        load_config(str(tmp_path))


def test_windows_longer_than_the_model(folder: Path) -> None:
    config = load_config(str(folder))
    check_length(config, 64)
    with pytest.raises(ValueError, match="seq_len=65 is longer .* 64 positions"):
        check_length(config, 65)


# --- code of the model ------------------------------------------------------------

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "my_lm"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


@pytest.fixture
def remote(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    (folder / "code.py").write_text(CODE)
    files = {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"}
    fields = {"model_type": "my_lm", "architectures": ["MyModel"], "auto_map": files}
    rewrite(folder / "config.json", **fields)
    return folder


def test_code_of_the_model_is_not_run_unasked(remote: Path) -> None:
    (remote / "code.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="code of its own.*set trust_remote_code=True"):
        load_config(str(remote))


@pytest.mark.parametrize("load", LOADERS)
def test_code_of_the_model_is_run_when_asked(load: Callable, remote: Path) -> None:
    config = load_config(str(remote), trust_remote_code=True)
    assert type(config).__name__ == "MyConfig"
    model = load(str(remote), "auto", trust_remote_code=True)
    assert type(model).__name__ == "MyModel"
    tiny.assert_same(tiny.snapshot(model), tiny.snapshot(make_model()))


# --- what would be refused at the end ---------------------------------------------


def check(folder: Path) -> None:
    config = load_config(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_saving(str(folder), empty_model(config), tokenizer)


def test_a_generation_config_that_cannot_be_saved(folder: Path) -> None:
    check(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    with pytest.raises(ValueError, match="will not save generation_config.json"):
        check(folder)
    file.write_text(json.dumps({"temperature": 0.9, "do_sample": True}))
    check(folder)
    file.unlink()
    check(folder)


def test_weights_that_are_shared(folder: Path) -> None:
    """A block that runs twice; tied embeddings are no such thing."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tied = tiny.make_model("llama", tie_word_embeddings=True)
    check_saving(str(folder), tied, tokenizer)
    model = make_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(RuntimeError, match="shared tensors"):  # what it is about
        model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"share without saying so .*layers.1.mlp"):
        check_saving(str(folder), model, tokenizer)


# --- where the weights lie --------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_bytes_of_the_weights(dtype: str, tmp_path: Path) -> None:
    make_model().half().save_pretrained(tmp_path)
    model = empty_model(load_config(str(tmp_path)))
    count = sum(x.numel() for x in make_model().parameters())
    assert weight_bytes(model, dtype) == count * (4 if dtype == "float32" else 2)


def test_bytes_of_weights_that_will_be_quantised(tmp_path: Path) -> None:
    make_model().half().save_pretrained(tmp_path)
    model = empty_model(load_config(str(tmp_path)))
    linears = find_blocks(model).linears().values()
    saved = sum(x.weight.numel() for x in linears)  # of two bytes each, half a byte now
    assert weight_bytes(model, "auto", 4) == weight_bytes(model, "auto") - 1.5 * saved


def test_bytes_of_experts_that_will_be_quantised() -> None:
    model = tiny.make_model("granitemoe").half()
    linears = find_blocks(model).linears().values()  # of experts too
    saved = sum(x.weight.numel() for x in linears)
    assert weight_bytes(model, "auto", 8) <= weight_bytes(model, "auto") - saved


@pytest.mark.parametrize("kind", ["paligemma", "florence2", "blip-2"])
def test_what_does_not_run_on_text_alone(kind: str, folder: Path) -> None:
    transformers.AutoConfig.for_model(kind).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"'{kind}' model, of which .* `oneshot`"):
        load_config(str(folder))


class Memory:
    """What psutil says is available."""

    def __init__(self, available: int) -> None:
        self.available = available


def offload_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("absorb-offload-*"))


def test_where_weights_lie_with_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the free memory of the first one is theirs, then comes the rest."""
    first = torch.device("cuda", 0)
    monkeypatch.setattr(loading, "main_device", lambda: first)
    monkeypatch.setattr(loading, "_free_memory", lambda: {0: 1000, 1: 2000})
    free = loading.SPARE_CPU_MEMORY + 3000
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: Memory(free))
    assert loading._placement(500, accelerator=True) == {"device_map": {"": first}}
    spread = loading._placement(501, accelerator=True)
    shutil.rmtree(spread["offload_folder"])
    assert spread["device_map"] == "auto"
    assert spread["max_memory"] == {0: 500, 1: 1800, "cpu": 3000}
    # to prune: where the pipelines of oneshot expect them
    assert loading._placement(3000, accelerator=False) == {}
    spread = loading._placement(3001, accelerator=False)
    shutil.rmtree(spread["offload_folder"])
    assert spread["max_memory"] == {"cpu": 3000}


def test_where_free_memory_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch tells it since 2.10."""
    monkeypatch.delattr(torch.accelerator, "get_memory_info", raising=False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(loading, "main_device", lambda: torch.device("cuda", 0))
    spread = loading._placement(1, accelerator=True)
    shutil.rmtree(spread["offload_folder"])
    assert spread["max_memory"][0] == spread["max_memory"][1] == 0


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    model = tiny.make_model("llama", num_hidden_layers=6)
    model.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_weights_that_do_not_fit_lie_on_disk(
    load: Callable,
    share: float,
    large: tuple[Path, PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, model = large
    size = sum(x.nbytes for x in model.parameters())
    free = loading.SPARE_CPU_MEMORY + int(share * size)
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: Memory(free))
    before = offload_folders()
    loaded = load(str(path), "auto")
    with disable_onloading():
        places = {x.device.type for x in loaded.parameters()}
    assert places == ({"meta", "cpu"} if share else {"meta"})
    (folder,) = offload_folders() - before

    windows = evaluation_windows([words(60)], make_tokenizer(True), 16)
    expected, _ = perplexity(model, windows, progress=False)
    assert perplexity(loaded, windows, progress=False)[0] == pytest.approx(expected)
    assert linear_sparsity(loaded) == 0
    tiny.assert_same(tiny.snapshot(loaded), tiny.snapshot(model))
    del loaded
    gc.collect()
    assert not folder.exists()


def test_a_model_without_its_tokenizer(tmp_path: Path, model_dir: Path) -> None:
    shutil.copy(model_dir / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer .*: copy the files"):
        load_tokenizer(str(tmp_path))


@pytest.mark.skipif(
    not hasattr(transformers, "Qwen3_5Config"), reason="transformers is older"
)
def test_what_sees_images_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    """By `AutoModelForCausalLM` the vision tower would be left out, and lost."""
    config = transformers.Qwen3_5Config()
    assert transformers.AutoModelForCausalLM._model_mapping[type(config)] is (
        transformers.Qwen3_5ForCausalLM
    )
    config.text_config.num_hidden_layers = 4
    config.vision_config.depth = 1
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    whole = empty_model(config)
    assert type(whole).__name__ == "Qwen3_5ForConditionalGeneration"
    assert any("visual" in name for name, _ in whole.named_parameters())
    config.architectures = ["Qwen3_5ForCausalLM"]  # as the text model alone is saved
    assert type(empty_model(config)).__name__ == "Qwen3_5ForCausalLM"


def test_a_processor_that_cannot_be_read_costs_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    config = tiny.with_images("llava").config
    config.architectures = ["LlavaForConditionalGeneration"]

    def broken(*_: Any) -> None:
        raise OSError("disk")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "processor_config.json").write_text("{}")
    monkeypatch.setattr(shutil, "copyfile", broken)
    copy_processor(str(tmp_path / "model"), config, tmp_path)
    (told,) = [line for line in warnings if "beside the pruned model" in line]
    assert told.startswith("processor_config.json of")
    assert files_in(tmp_path) == {"model"}
