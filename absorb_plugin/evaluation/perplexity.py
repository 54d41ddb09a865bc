"""What a pruned model is worth: perplexity, and the share of weights that are zero."""

import math
from collections.abc import Sequence

import torch
from accelerate.utils import align_module_device
from compressed_tensors.offload import get_execution_device
from loguru import logger
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb_plugin.compressed import dense_weight
from absorb_plugin.language_model import check_largest_id
from absorb_plugin.overflow import exp

__all__ = [
    "input_device",
    "linear_sparsity",
    "perplexity",
    "sparsity_if_known",
]

# Rows of logits that go through the float32 softmax at once: 64 MB per 256k vocabulary.
ROWS = 64
# In the name of every class of transformers 5 that holds experts in one tensor.
EXPERTS = "Expert"


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: Sequence[Sequence[int]], progress: bool = True
) -> tuple[float, int]:
    """
    exp(mean negative log-likelihood) over every token that has one before it in its
    window. The sum and the count are kept apart and divided last, so that windows of
    different lengths weigh what they hold.

    The logits are the model's own (`model(...).logits`), so whatever it does after the
    head, e.g. Gemma 2's soft cap, is in them; one window at a time and a softmax over
    few rows keep memory bounded for large vocabularies.

    :param model: causal language model, on any device, offloaded or not
    :param windows: token ids per window, at least one window of two tokens
    :param progress: show a bar on stderr
    :return: (perplexity, number of predicted tokens); infinite where it is beyond the
        largest float
    :raises ValueError: if there is nothing to predict, the model does not know a
        token, or the logits are not finite
    """
    largest = max((max(window, default=0) for window in windows), default=0)
    check_largest_id(model, largest)
    device = input_device(model)
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for index, window in enumerate(
            tqdm(windows, desc="Perplexity", disable=not progress)
        ):
            ids = torch.tensor([list(window)], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            nll = _negative_log_likelihood(logits, ids[0, 1:].to(logits.device))
            if not math.isfinite(nll):
                raise ValueError(
                    f"the model's logits are not finite in window {index}: it has no "
                    "perplexity"
                )
            total += nll
            tokens += ids.shape[1] - 1
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ValueError("no token to predict: every window has fewer than two tokens")
    return exp(total / tokens), tokens


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model wants its token ids, whoever has offloaded it."""
    embedding = model.get_input_embeddings()
    # accelerate leaves a meta tensor as the weight, and a hook that knows
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return get_execution_device(embedding) if device is None else torch.device(device)


def _negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """
    :param logits: shape (tokens, vocabulary), any dtype
    :param targets: shape (tokens,)
    :return: summed over the tokens
    """
    return sum(
        torch.nn.functional.cross_entropy(
            rows.float(), row_targets, reduction="sum"
        ).item()
        for rows, row_targets in zip(
            logits.split(ROWS), targets.split(ROWS), strict=True
        )
    )


@torch.no_grad()
def linear_sparsity(model: PreTrainedModel) -> float:
    """
    Share of zeros among the weights of all Linears except the output head, and of
    experts that transformers holds in one tensor. Of a model that was saved in a
    quantised format it is the share among the dequantised weights, so it counts those
    that rounding made zero as well.

    :raises ValueError: if the model has no such Linear, or one whose weights are packed
    """
    head = model.get_output_embeddings()
    zeros, weights = 0, 0
    for module in model.modules():
        linear = isinstance(module, torch.nn.Linear)
        if module is head or not (linear or EXPERTS in type(module).__name__):
            continue
        # accelerate leaves a meta tensor in place of what it offloads
        with align_module_device(module):
            own = [dense_weight(module)] if linear else _experts(module)
            zeros += sum(int((weight == 0).sum()) for weight in own)
            weights += sum(weight.numel() for weight in own)
    if weights == 0:
        raise ValueError("the model has no Linear besides its output head")
    return zeros / weights


def _experts(module: torch.nn.Module) -> list[torch.Tensor]:
    """Weights of all experts of a block, where a module has them in one tensor."""
    found: list[torch.Tensor] = [
        parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() > 1 and "bias" not in name
    ]
    if not all(map(torch.is_floating_point, found)):
        raise ValueError("the model's experts are packed: zeros cannot be counted")
    return found


def sparsity_if_known(model: PreTrainedModel) -> float | None:
    """`linear_sparsity`; None, and a warning, where it cannot be counted."""
    try:
        return linear_sparsity(model)
    except ValueError as error:
        logger.warning(f"Sparsity unknown: {error}")
        return None
