"""Runs of llm-compressor's own `oneshot` on tiny models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import apply_quantization_config
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import (
    SparseGPTModifier,
    WandaPruningModifier,
)
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import PreTrainedModel, set_seed

from absorb_plugin import AbsorptionAllocationModifier, pruners
from absorb_plugin.allocate import Allocation
from absorb_plugin.allocate import allocate as allocate_all
from absorb_plugin.blocks import find_blocks
from absorb_plugin.calibration import Batch
from absorb_plugin.pruners.quantization import QuantizedLinears
from helpers import tiny

PRUNERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
# Random weights have a flat loss, so strength is a number wherever a test is not about
# the search itself.
QUICK = {"signal": "gradient", "strength": 0.2, "max_sparsity": 0.9}


def absorption(**fields: Any) -> AbsorptionAllocationModifier:
    return AbsorptionAllocationModifier(**{**QUICK, **fields})


def pruner(kind: str = "wanda", **fields: Any) -> Modifier:
    default = {"sparsity": 0.5, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    return PRUNERS[kind](**{**default, **fields})


def quantizer(scheme: str, **fields: Any) -> QuantizationModifier:
    return QuantizationModifier(
        targets=["Linear"], ignore=["lm_head"], scheme=scheme, **fields
    )


def given_schemes(
    model: PreTrainedModel, modifier: QuantizationModifier
) -> QuantizedLinears:
    """As llm-compressor gives them, before anything is calibrated."""
    config = modifier.model_copy(deep=True).resolve_quantization_config()
    apply_quantization_config(model, config)
    return QuantizedLinears.of([type(modifier).__name__], find_blocks(model))


def allocate(
    model: PreTrainedModel,
    batches: Sequence[Batch] | None = None,
    sparsity: float = 0.5,
    kind: str = "wanda",
    quantized: QuantizedLinears | None = None,
    **fields: Any,
) -> Allocation:
    """
    :param batches: by default one of four samples
    :param kind: of the pruner that it is for
    :param quantized: what its Linears are quantised to afterwards
    :param fields: of the modifier
    """
    return allocate_all(
        model,
        find_blocks(model),
        [tiny.make_batch(4)] if batches is None else batches,
        sparsity=sparsity,
        pruner=pruners.PRUNERS[kind](),
        settings=absorption(**fields),
        quantized=quantized,
    )


def run(
    model: PreTrainedModel,
    recipe: Any,
    directory: Path,
    *,
    dataset: Dataset | None = None,
    samples: int = 6,
    **fields: Any,
) -> PreTrainedModel:
    """
    :param directory: for the files that `oneshot` wants to read or writes
    """
    model, tokenizer = tiny.with_tokenizer(model, directory / "config")
    set_seed(0)
    return oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=tiny.make_dataset(samples) if dataset is None else dataset,
        num_calibration_samples=samples,
        max_seq_length=16,
        **fields,
    )


def zeros(model: torch.nn.Module, names: Mapping[str, Any]) -> dict[str, list[int]]:
    """Full name of a Linear -> number of zeros in each row."""
    return {
        name: (model.get_submodule(name).weight == 0).sum(dim=1).tolist()
        for name in names
    }
