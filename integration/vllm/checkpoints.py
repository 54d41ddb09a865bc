"""
The checkpoints that are served: SmolLM2-135M pruned by us, plain and quantised.

Few calibration tokens and one round of a fixed strength: what is judged is the serving.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.evaluation.demo import demo_model, demo_texts
from absorb_plugin.evaluation.oneshot import prune
from absorb_plugin.evaluation.text import calibration_samples, evaluation_windows

SPARSITY = 0.5
SAMPLES = 8
SEQ_LEN = 64
SEED = 0
TEXT_LEN = 128  # tokens of a text that is judged

PROMPTS = [
    "Python is a programming language that",
    "The capital of France is",
    "def fibonacci(n):",
    "A list comprehension consists of",
    "Once upon a time there was",
    "Water boils when",
    "An exception is raised if",
    "The three primary colours are",
]


def pruner(kind: type[Modifier]) -> Modifier:
    return kind(sparsity=SPARSITY, targets=["Linear"], ignore=["re:.*lm_head"])


def quantizer(scheme: str) -> Modifier:
    return QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme=scheme)


def four_bits() -> Modifier:
    """W4A16 with groups of 64: SmolLM2's 576 columns are no multiple of 128."""
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


# name -> modifiers behind the allocation
RECIPES: dict[str, Callable[[], list[Modifier]]] = {
    "Wanda": lambda: [pruner(WandaPruningModifier)],
    "SparseGPT + W8A8": lambda: [pruner(SparseGPTModifier), quantizer("W8A8")],
    "SparseGPT + W4A16": lambda: [pruner(SparseGPTModifier), four_bits()],
    "SparseGPT + FP8_DYNAMIC": lambda: [
        pruner(SparseGPTModifier),
        quantizer("FP8_DYNAMIC"),
    ],
}


def make_checkpoint(name: str, out: Path) -> None:
    """One recipe, absorption -> pruner -> quantiser, through the real `oneshot`."""
    source = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    samples = calibration_samples([demo_texts()[0]], tokenizer, SAMPLES, SEQ_LEN, SEED)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    allocation = AbsorptionAllocationModifier(
        allocator="owl", strength=0.1, signal_samples=2
    )
    recipe = [allocation, *RECIPES[name]()]
    prune(model, tokenizer, recipe, samples, seed=SEED, output_dir=out)


def questions(checkpoint: Path, windows: int) -> tuple[list[list[int]], ...]:
    """
    :return: token ids of the prompts, token ids of the texts to be judged
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    texts = evaluation_windows([demo_texts()[1]], tokenizer, TEXT_LEN, windows)
    return prompts, texts
