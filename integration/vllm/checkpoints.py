"""The checkpoints that are served: SmolLM2-135M pruned by us, plain and quantised."""

from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.demo import demo_model, demo_texts
from absorb_plugin.prune import prune
from absorb_plugin.text import calibration_samples, evaluation_windows

SPARSITY = 0.5
SAMPLES = 16
SEQ_LEN = 128
SEED = 0

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


def quantizer(scheme: str) -> QuantizationModifier:
    return QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme=scheme)


def four_bits() -> QuantizationModifier:
    """W4A16 with groups of 64: SmolLM2's 576 columns are no multiple of 128."""
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


# name -> modifiers behind the pruner
QUANTIZERS: dict[str, Callable[[], list[Modifier]]] = {
    "pruned": lambda: [],
    "pruned + W8A8": lambda: [quantizer("W8A8")],
    "pruned + W4A16": lambda: [four_bits()],
    "pruned + FP8_DYNAMIC": lambda: [quantizer("FP8_DYNAMIC")],
}


def make_checkpoint(name: str, out: Path) -> None:
    """
    One recipe: absorption -> SparseGPT -> quantizer, by the real `oneshot`. One round
    of a fixed strength: what is judged here is the serving.
    """
    source = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    samples = calibration_samples([demo_texts()[0]], tokenizer, SAMPLES, SEQ_LEN, SEED)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    allocation = AbsorptionAllocationModifier(allocator="owl", strength=0.1)
    pruner = SparseGPTModifier(
        sparsity=SPARSITY, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    recipe = [allocation, pruner, *QUANTIZERS[name]()]
    prune(model, tokenizer, recipe, samples, seed=SEED, output_dir=out)


def questions(checkpoint: Path, windows: int) -> tuple[list[list[int]], ...]:
    """
    :return: token ids of the prompts, token ids of the texts to be judged
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    texts = evaluation_windows([demo_texts()[1]], tokenizer, SEQ_LEN, windows)
    return prompts, texts
