"""
Configurations, tokenizers and models from a directory or the hub. What can be wrong
with a checkpoint is found before its weights are read, as far as its files tell.
"""

import re
import shutil
import tempfile
import weakref
import zipfile
from pathlib import Path
from typing import Any

import psutil
import torch
from loguru import logger
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import CompressedTensorsConfig

from absorb_plugin.devices import free_memory
from absorb_plugin.distributed import main_device
from absorb_plugin.evaluation.shards import (
    check_directory,
    indexed_files,
    open_safetensors,
    weights_entry,
)
from absorb_plugin.files import check_pointer

__all__ = [
    "check_length",
    "check_saving",
    "copy_processor",
    "empty_model",
    "load_config",
    "load_for_pruning",
    "load_model",
    "load_tokenizer",
    "weight_bytes",
]

# Heads that predict something else than the next token.
OTHER_HEAD = re.compile(
    r"For\w*(Classification|QuestionAnswering|MaskedLM|MultipleChoice|PreTraining"
    r"|Prediction|RewardModel|Retrieval)$|Reranker"
)
BASE_MODEL = re.compile(r"(?<!LMHead)Model$")
# Model types that see images, which AutoModelForCausalLM does not know, and that were
# tried on text alone. Others want images, or have tokens that see those after them.
RUN_ON_TEXT = ("llava", "mistral3", "qwen2_vl", "qwen2_5_vl")
# What a model that sees images is used with, beside its tokenizer.
OF_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# Configurations and what tokenizers are made of.
OF_TOKENIZERS = ("*token*", "vocab*", "merges.txt", "*.model")
SMALL_FILES = ("*config.json", *OF_TOKENIZERS)
# Share of the first device's free memory that resident weights may take; the rest is
# for hidden states and logits.
RESIDENT = 0.5
# Left free of weights in the CPU's memory [bytes].
SPARE_CPU_MEMORY = 5_000_000_000


def load_config(model: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """
    :param model: directory or hub id, of which the config is read, and the files of a
        directory are looked at
    :return: the whole config, of images and text where it has both
    :raises FileNotFoundError: if `model` looks like a directory and there is none, the
        hub has none of that name or cannot be asked, or its config or files of weights
        are missing
    :raises NotADirectoryError: if it is a file
    :raises ValueError: if it is an adapter, its files are damaged, or it is no language
        model that predicts the next token
    """
    is_here = Path(model).exists()
    if is_here:
        _check_files(Path(model))
    elif model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"{model}: no such model directory")
    else:  # which may take half a minute where there is no network
        logger.info(f"{model} is no directory here, and is taken for a hub id")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except OSError as error:
        if is_here:
            raise
        raise FileNotFoundError(
            f"{model!r} is no directory here, and as a hub id: {error}"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{model} comes with code of its own, which can do anything. Read it; then "
            "set trust_remote_code=True to run it"
        ) from error
    _check_language_model(model, config)
    return config


def _check_files(folder: Path) -> None:
    check_directory(folder)
    for file in sorted({x for pattern in SMALL_FILES for x in folder.glob(pattern)}):
        check_pointer(file)
    entry = weights_entry(folder)
    for file in indexed_files(entry) if entry.suffix == ".json" else [entry]:
        if file.suffix == ".safetensors":
            open_safetensors(file)  # reads the header
        else:
            _check_pickle(file)


def _check_pickle(file: Path) -> None:
    """
    Of torch's zip files the directory stands at the end; of a pickle, as torch before
    1.6 wrote them, nothing tells how long it is.
    """
    check_pointer(file)
    with file.open("rb") as content:
        start = content.read(2)
    if start[:1] != b"\x80" and not (start == b"PK" and zipfile.is_zipfile(file)):
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is damaged or cut short. Copy or "
            "download it again"
        )


def _check_language_model(model: str, config: PretrainedConfig) -> None:
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return  # its own code says what it is
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known and config.model_type not in RUN_ON_TEXT:
        raise ValueError(
            f"{model} is a {config.model_type!r} model, of which transformers has none "
            "that predicts the next token as AutoModelForCausalLM: only decoder "
            "language models can be judged. One of another class that runs on text "
            "alone can be loaded from Python, and pruned by `oneshot`"
        )
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    for name in config.architectures or []:
        # of a base model with a head of its own the weights tell, once they are loaded
        if OTHER_HEAD.search(name) or (tied and BASE_MODEL.search(name)):
            raise ValueError(
                f"{model} was saved as {name}, which does not predict the next token; "
                "everything here is judged by that. Give the language model it was "
                "made from"
            )


def check_length(config: PretrainedConfig, length: int) -> None:
    """
    :raises ValueError: if windows of `length` tokens do not fit the model
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"seq_len={length} is longer than the model's {positions} positions"
        )


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """
    The tokenizer of a directory or hub id, a `PreTrainedTokenizerBase`.

    :raises FileNotFoundError: if the directory has none
    """
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception:  # whatever transformers raises: it names packages instead
        folder = Path(model).expanduser()
        found = (path for kind in OF_TOKENIZERS for path in folder.glob(kind))
        if folder.is_dir() and next(found, None) is None:
            raise FileNotFoundError(
                f"{model} has no tokenizer (tokenizer.json or tokenizer.model, or "
                "vocab.json and merges.txt): copy the files of the model that it was "
                "made from"
            ) from None
        raise


def empty_model(
    config: PretrainedConfig, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model without its weights, on the meta device."""
    with torch.device("meta"):
        return _auto_class(config).from_config(
            config, trust_remote_code=trust_remote_code
        )


def _auto_class(config: PretrainedConfig) -> Any:
    """
    Of some models that see images (Qwen3.5) `AutoModelForCausalLM` loads the language
    model alone: what is pruned is saved again, and the rest would be lost. Others
    (LLaVA) it does not know.
    """
    return AutoModelForImageTextToText if _sees_images(config) else AutoModelForCausalLM


def _sees_images(config: PretrainedConfig) -> bool:
    """Whether it was saved as such a model."""
    saved_as = (config.architectures or [""])[0]
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return getattr(whole, "__name__", None) == saved_as


def copy_processor(name: str, config: PretrainedConfig, folder: Path) -> None:
    """
    Of a model that sees images, what prepares them, into where its copy is saved:
    `oneshot` saves the tokenizer alone.

    :param name: directory or hub id
    """
    # most have one of these, and what is pruned must not be lost for want of another
    quiet = {
        f"_raise_exceptions_for_{what}": False
        for what in ("missing_entries", "connection_errors", "gated_repo")
    }
    for file in OF_PROCESSORS if _sees_images(config) else ():
        try:
            found = cached_file(name, file, **quiet)
            if found is not None and not (folder / file).exists():
                shutil.copyfile(found, folder / file)
        except OSError as error:
            logger.warning(f"{file} of {name} is not beside the pruned model: {error}")


def weight_bytes(
    model: PreTrainedModel, dtype: str, linear_bits: int | None = None
) -> int:
    """
    :param model: with or without its weights
    :param dtype: of the weights, "auto" as they were saved
    :param linear_bits: that weights are quantised to, of all that may be: matrices
        but for embeddings and the head
    """
    saved = model.config.get_text_config().dtype or torch.float32
    chosen = saved if dtype == "auto" else getattr(torch, dtype)
    found = sum(parameter.numel() for parameter in model.parameters())
    if linear_bits is None:
        return found * chosen.itemsize
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    whole = {id(end.weight) for end in ends if end is not None}
    matrices = (x for x in model.parameters() if x.dim() > 1 and id(x) not in whole)
    quantised = sum(matrix.numel() for matrix in matrices)
    return (found - quantised) * chosen.itemsize + quantised * linear_bits // 8


def check_saving(name: str, model: PreTrainedModel, tokenizer: Any) -> None:
    """
    Save all but the weights, into a directory that is thrown away: transformers loads
    some configurations that it refuses to save, and says so when the model is pruned.

    :param name: directory or hub id
    :param model: with or without its weights
    :raises ValueError: naming what is refused
    """
    parts = {
        "config.json": model.config,
        "generation_config.json": _generation_config(name, model.config),
        "the tokenizer": tokenizer,
    }
    with tempfile.TemporaryDirectory() as folder:
        for part, content in parts.items():
            try:
                content.save_pretrained(folder)
            except Exception as error:  # checks of several libraries
                raise ValueError(
                    f"{name}: transformers will not save {part}, so the pruned model "
                    f"could not be saved. Correct it first: {error}"
                ) from error
    if shared := _shared_weights(model):
        raise ValueError(
            f"{name}: transformers will not save weights that modules share without "
            f"saying so ({', '.join(shared)}), so the pruned model could not be saved. "
            "Name them in _tied_weights_keys of its class"
        )


def _shared_weights(model: PreTrainedModel) -> list[str]:
    """Names of one weight, beside those that the model's class declares."""
    declared = _tied_names(model)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not any(re.search(pattern, name) for pattern in declared):
            names.setdefault(id(parameter), []).append(name)
    return next((found for found in names.values() if len(found) > 1), [])


def _tied_names(model: PreTrainedModel) -> list[str]:
    """Patterns; transformers 5 keeps tied name -> name, earlier ones a list."""
    return list(getattr(model, "all_tied_weights_keys", model._tied_weights_keys) or [])


def _generation_config(model: str, config: PretrainedConfig) -> GenerationConfig:
    """As the loaded model will have it."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # there is no such file
        return GenerationConfig.from_model_config(config)


def load_model(
    model: str, dtype: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """
    Load for evaluation and allocation. The first accelerator computes; weights of more
    than half of its free memory lie on the other ones, in the CPU's memory, or on disk,
    as far as they must, and come when they are needed. Without an accelerator they lie
    in memory, or on disk where that is too small.

    :param model: directory or hub id
    :param dtype: dtype of the weights, "auto" as they were saved
    :raises ValueError: if the checkpoint lacks weights of the model
    """
    return _load(model, dtype, trust_remote_code, accelerator=True)


def load_for_pruning(
    model: str, dtype: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """
    Load as `oneshot` does: in the CPU's memory, for its pipelines bring the weights to
    the accelerator; on disk where memory is too small; dequantised where it was saved
    by llm-compressor.

    :raises ValueError: if the checkpoint lacks weights of the model
    """
    return _load(model, dtype, trust_remote_code, accelerator=False, dequantize=True)


def _load(
    model: str,
    dtype: str,
    trust_remote_code: bool,
    accelerator: bool,
    dequantize: bool = False,
) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    needed = weight_bytes(empty_model(config, trust_remote_code), dtype)
    placement = _placement(needed, accelerator)
    quantization = getattr(config, "quantization_config", None) or {}
    if dequantize and quantization.get("quant_method") == "compressed-tensors":
        placement["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    loaded, info = _auto_class(config).from_pretrained(
        model,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **placement,
    )
    if info["missing_keys"]:
        raise ValueError(_missing(model, sorted(info["missing_keys"])))
    if "offload_folder" in placement:
        _onload_on(loaded, main_device())
        weakref.finalize(loaded, shutil.rmtree, placement["offload_folder"], True)
    return loaded


def _missing(model: str, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return (
        f"{model} has no weights for {shown} ({len(names)} in all), and random numbers "
        "would stand in their place. It was saved incompletely, or without the head of "
        "a language model: give a complete one"
    )


def _placement(needed: int, accelerator: bool) -> dict[str, Any]:
    """
    Arguments of `from_pretrained` for where the weights are to lie.

    :param needed: bytes of the weights
    :param accelerator: whether they may lie there
    """
    cpu = max(0, psutil.virtual_memory().available - SPARE_CPU_MEMORY)
    room: dict[int | str, int] = {"cpu": cpu}
    main = main_device()
    if accelerator and main.type != "cpu":
        free = _free_memory()
        if needed <= RESIDENT * free[main.index]:
            return {"device_map": {"": main}}
        room |= {i: int((RESIDENT if i == main.index else 0.9) * free[i]) for i in free}
    elif needed <= cpu:
        return {}
    folder = tempfile.mkdtemp(prefix="absorb-offload-")
    return {
        "device_map": "auto",
        "max_memory": room,
        "offload_folder": folder,
        "offload_buffers": True,
    }


def _free_memory() -> dict[int, int]:
    """Free bytes of every accelerator."""
    kind = main_device().type
    if kind == "mps":  # it has no memory of its own
        return {0: psutil.virtual_memory().available}
    # where it is not known the weights wait in the CPU's memory
    return {
        index: free_memory(torch.device(kind, index)) or 0
        for index in range(torch.accelerator.device_count())
    }


def _onload_on(model: PreTrainedModel, device: torch.device) -> None:
    """
    From accelerate's way of spreading a model, in which every block computes where it
    lies, to that of llm-compressor: all compute on one device, weights lie where they
    do.
    """
    from compressed_tensors.offload import from_accelerate, set_onload_device

    from_accelerate(model)
    set_onload_device(model, device)
