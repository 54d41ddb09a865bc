"""The language model within whatever wraps it, and whether its loss means anything."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch.nn import Module
from transformers import PreTrainedModel

__all__ = [
    "REMEDY",
    "WITHOUT_FORWARD",
    "check_ids",
    "check_largest_id",
    "check_predicts_tokens",
    "forward_inputs",
    "language_model",
    "without_extras",
]

# What a batch may hold beside a model's inputs. Of tokens and their embeddings models
# take one; losses need the tokens.
NOT_OURS = {"labels", "past_key_values", "use_cache", "inputs_embeds"}

# What a forward may give beside logits: a key-value cache, and the load of experts, of
# which a forward of the head alone has none.
EXTRAS = ("use_cache", "output_router_logits")

REMEDY = (
    "Use strength: 0, which keeps the base allocation, or signal: noise with a number "
    "as strength"
)

# Where no block may be run by us at all.
WITHOUT_FORWARD = (
    "Use strength: 0 and an allocator that needs no activations, as alpha_pruning"
)


def language_model(model: Module) -> PreTrainedModel:
    """
    The transformers model itself, or the one that a wrapper (peft, DataParallel, a
    module of the user's) holds. Our forwards run this one.

    :raises ValueError: if there is none, or several side by side
    """
    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        inside = any(not n or name.startswith(f"{n}.") for n, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    if len(found) == 1:
        return found[0][1]
    kind = type(model).__name__
    if not found:
        raise ValueError(
            f"model: {kind} is no transformers model and holds none. Pass a "
            "PreTrainedModel, or a module that wraps one"
        )
    names = ", ".join(name for name, _ in found)
    raise ValueError(
        f"model: {kind} holds several transformers models ({names}). Pass the one that "
        "is to be pruned"
    )


def check_predicts_tokens(model: Module) -> None:
    """
    :raises ValueError: for a model that is not made to predict the next token: a base
        model, a classifier, a reranker with one score, an encoder
    """
    inner = language_model(model)
    kind = type(inner).__name__
    if kind.endswith("ForMaskedLM"):
        reason = "predicts tokens in the middle of a text"
    elif inner.get_output_embeddings() is None and not kind.endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    ):
        reason = "has no language-model head"
    else:
        return
    raise ValueError(
        f"model: {kind} {reason}, so next-token loss, by which strength='auto' and "
        f"most signals judge, means nothing there. {REMEDY}"
    )


def check_ids(model: Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """:raises ValueError: if a token id is beyond the model's embeddings"""
    check_largest_id(model, max(int(batch["input_ids"].max()) for batch in batches))


def check_largest_id(model: Module, largest: int) -> None:
    """:raises ValueError: if that token id is beyond the model's embeddings"""
    embeddings = language_model(model).get_input_embeddings()
    known = getattr(embeddings, "num_embeddings", None)
    if known is not None and largest >= known:
        raise ValueError(
            f"input_ids hold {largest}, and the model knows {known} tokens: use the "
            "model's own tokenizer. Where it has new tokens call "
            "model.resize_token_embeddings(len(tokenizer))"
        )


@contextmanager
def without_extras(model: Module) -> Iterator[None]:
    """Within the context no configuration in the model asks for any of EXTRAS."""
    with ExitStack() as stack:
        for config in _configs(model):
            for name in EXTRAS:
                if isinstance(asked := getattr(config, name, None), bool):
                    stack.callback(setattr, config, name, asked)
                    setattr(config, name, False)
        yield


def _configs(model: Module) -> list:
    """Every configuration, nested ones included."""
    found: dict[int, object] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        nested = vars(config).values() if hasattr(config, "__dict__") else ()
        for one in (config, *nested):
            if any(isinstance(getattr(one, name, None), bool) for name in EXTRAS):
                found[id(one)] = one
    return list(found.values())


def forward_inputs(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """
    What a forward of ours passes on of a batch: nothing that the model does not take,
    no labels, for their loss is not ours, and the wish for no cache, where it is heard.
    """
    parameters = signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    inputs: dict[str, Any] = {
        name: tensor
        for name, tensor in batch.items()
        if name not in NOT_OURS and (open_ended or name in parameters)
    }
    return inputs | ({"use_cache": False} if "use_cache" in parameters else {})
