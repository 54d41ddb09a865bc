"""Calibration batches: read once, checked, cut to size, moved where the model runs."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from compressed_tensors.utils import patch_attr
from datasets import Dataset
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils.helpers import (
    DisableQuantization,
    calibration_forward_context,
)
from loguru import logger
from torch.utils.data import DataLoader

from absorb_plugin import distributed
from absorb_plugin.batches import as_tensors
from absorb_plugin.cpu import fast_bfloat16
from absorb_plugin.devices import computes_on_cpu, holds
from absorb_plugin.language_model import without_extras
from absorb_plugin.precision import ieee_float32
from absorb_plugin.torch_state import plain_torch

__all__ = [
    "JOINED",
    "Batch",
    "calibrating",
    "count_tokens",
    "cut_tokens",
    "evenly_spaced",
    "has_media",
    "interleaved",
    "join_samples",
    "pad_to_batch",
    "padding_share",
    "read_batches",
    "sample_key",
    "samples_of",
    "single_samples",
    "sort_samples",
    "split_samples",
    "token_mask",
]

# Samples that are joined to a batch at most; `probe_memory` cuts it again. An offloaded
# model is onloaded anew for every batch.
JOINED = 32
# The field of a configuration that names the form of attention, and PyTorch's own.
ATTENTION, FUSED = "_attn_implementation", "sdpa"

Batch = Mapping[str, torch.Tensor]
T = TypeVar("T")


@contextmanager
def calibrating(model: torch.nn.Module) -> Iterator[None]:
    """
    The context of llm-compressor's own calibration passes: no gradients, no cache, no
    dropout, no quantisation. Float32 products are just that. The hooks of other
    modifiers sleep, so that a run of ours leaves no trace in their statistics; enter it
    once, `disable_hooks` does not nest.

    :param model: not wrapped: llm-compressor's context passes over wrappers
    """
    attention = _attention(model)
    with ExitStack() as stack:
        stack.enter_context(calibration_forward_context(model))
        on_cpu = computes_on_cpu(model)
        if attention == FUSED and on_cpu and not _caps_attention(model):
            # eager attention is for graphs that are traced, and none are here; of 512
            # tokens it takes a CPU as long as all other products
            stack.enter_context(patch_attr(model.config, ATTENTION, FUSED))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            # what hooks and other weights do to a block is for no graph
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(without_extras(model))
        stack.enter_context(DisableQuantization(model))
        stack.enter_context(HooksMixin.disable_hooks())
        if holds(model, torch.bfloat16):  # else it looks at every function for nothing
            stack.enter_context(fast_bfloat16())
        stack.enter_context(ieee_float32())
        yield


def _attention(model: torch.nn.Module) -> str | None:
    """How a Hugging Face model computes attention; None of another."""
    return getattr(getattr(model, "config", None), ATTENTION, None)


def _caps_attention(model: torch.nn.Module) -> bool:
    """Whether scores are capped, as Gemma 2's are; fused attention leaves that out."""
    config: Any = model.config
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return capped is not None


def is_empty(loader: object) -> bool:
    """Whether a loader says that it holds nothing; one of a stream does not say."""
    try:
        return not len(loader)  # type: ignore[arg-type]
    except TypeError:
        return False


@plain_torch()
def read_batches(loader: DataLoader | Iterable[Batch] | None) -> list[dict]:
    """
    Read the calibration loader once. The random state is put back afterwards, so that
    a shuffling loader gives the pruner the very samples that it would give without us.

    :return: batches of CPU tensors, each with "input_ids" of shape (batch, tokens);
        under torch.distributed those of all ranks, the same on every rank
    :raises ValueError: if there is no data, or batches have no input_ids
    """
    with distributed.fail_together():
        if loader is None:
            raise ValueError(
                "no calibration data: absorption needs text to run the model on. Pass "
                "oneshot(dataset=..., num_calibration_samples=...)"
            )
        own = _read(loader)
    batches = _union(distributed.gather(own))
    if not batches:
        raise ValueError(
            "no calibration data: the calibration set has no token. Check the dataset "
            "and num_calibration_samples"
        )
    return batches


def _union(parts: list[list[dict]]) -> list[dict]:
    """
    The batches of all ranks. Where llm-compressor shards a data set itself, every rank
    gets its first rows (0.14.0.1: the sampler counts within the shard, the loader in
    the whole): ranks whose samples another one has, all of them, add nothing.
    """
    held = [Counter(map(sample_key, split_samples(part, 1))) for part in parts]
    most = max(held, key=Counter.total)
    if len([own for own in held if own]) > 1 and all(own <= most for own in held):
        if distributed.is_first():
            logger.warning(
                f"the ranks were given the same {most.total()} calibration samples, "
                "which are counted once. Give every rank a shard of its own: "
                "oneshot(dataset=dataset.shard(world_size, rank))"
            )
        return parts[held.index(most)]
    return [batch for part in parts for batch in part]


def _read(loader: DataLoader | Iterable[Batch]) -> list[dict]:
    with torch.random.fork_rng(devices=[]), _keep_generator(loader):
        batches = [as_tensors(batch) for batch in loader]
    kept = [batch for batch in batches if batch["input_ids"].numel()]
    if kept and len(kept) < len(batches):
        raise ValueError(
            f"{len(batches) - len(kept)} of {len(batches)} calibration batches have no "
            "token, on which llm-compressor's own calibration fails: leave empty rows "
            "out of the dataset"
        )
    return kept


@contextmanager
def _keep_generator(loader: object) -> Iterator[None]:
    holders = (loader, getattr(loader, "sampler", None))
    generators = [getattr(holder, "generator", None) for holder in holders]
    states = [(g, g.get_state()) for g in generators if g is not None]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def samples_of(dataset: Dataset) -> list[dict]:
    """:param dataset: rows of `input_ids` and `attention_mask`; a batch of one each"""
    rows = dataset.with_format("torch")
    return [{name: row[name][None] for name in row} for row in rows]


def split_samples(batches: Iterable[Batch], size: int) -> Iterator[dict]:
    """
    Cut batches into ones of at most `size` samples, order kept.

    :raises ValueError: for a batch of several samples whose images are packed
    """
    for batch in batches:
        total = len(batch["input_ids"])
        packed = [name for name, tensor in batch.items() if len(tensor) != total]
        if total > size and packed:
            raise ValueError(
                f"a calibration batch of {total} samples holds {packed[0]!r} for all "
                "of them in one: they cannot be told apart. Use batch_size=1, or rows "
                "of text alone"
            )
        for start in range(0, total, size):
            yield {
                name: tensor if name in packed else tensor[start : start + size]
                for name, tensor in batch.items()
            }


def has_media(batch: Batch) -> bool:
    """Whether it holds arrays that are not one entry per token: images, sounds."""
    arrays = [tensor for tensor in batch.values() if tensor.dim() > 1]
    return not all(_per_token(batch, tensor) for tensor in arrays)


def _per_token(batch: Batch, tensor: torch.Tensor) -> bool:
    return tensor.dim() > 1 and tensor.shape[:2] == batch["input_ids"].shape


def single_samples(batches: Iterable[Batch], by_loss: bool = False) -> list[dict]:
    """
    The samples one by one, without the padding around them, and without those that are
    of no use, of which a warning tells.

    :param by_loss: a sample must have a token to predict: two neighbours that are no
        padding. Else one token that is no padding will do
    :raises ValueError: if no sample is left
    """
    samples = list(split_samples(batches, 1))
    if by_loss:
        useful = [x for x in samples if _predicts(x)]
        wanted = "needs two neighbouring tokens that are no padding. Use longer samples"
        lacking = "has no token to predict"
    else:
        useful = [x for x in samples if token_mask(x).any()]
        wanted, lacking = "needs one token that is no padding", "has no token"
    if not useful:
        raise ValueError(f"the calibration set {lacking}: a sample {wanted}")
    if len(useful) < len(samples):
        logger.warning(
            f"{len(samples) - len(useful)} of {len(samples)} calibration samples are "
            f"left out: a sample {wanted}"
        )
    # of what an expert of a mixture gets nothing tells that it is padding
    return [cut_tokens(sample, sample["input_ids"].shape[1]) for sample in useful]


def _predicts(sample: Batch) -> bool:
    mask = token_mask(sample)
    return bool((mask[:, 1:] & mask[:, :-1]).any())


def join_samples(samples: Iterable[Batch], size: int = JOINED) -> list[dict]:
    """
    Join up to `size` neighbouring samples of equal shape to a batch, order kept. Those
    with images stay alone, for a batch of them could not be split again.
    """
    batches: list[dict] = []
    for sample in samples:
        last = batches[-1] if batches else {}
        fits = last and len(last["input_ids"]) < size and not has_media(sample)
        if fits and {k: v.shape[1:] for k, v in last.items()} == {
            k: v.shape[1:] for k, v in sample.items()
        }:
            batches[-1] = {k: torch.cat([last[k], v]) for k, v in sample.items()}
        else:
            batches.append(dict(sample))
    return batches


def pad_to_batch(samples: Sequence[Batch]) -> dict:
    """
    One batch of single samples of whatever length, padded on the right where theirs
    differ. Images of all samples follow each other.

    :raises ValueError: if they cannot, for their sizes differ
    """
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    lengths = {sample["input_ids"].shape[1] for sample in samples}
    masked = len(lengths) > 1 or any("attention_mask" in x for x in samples)
    if masked:
        samples = [
            {**x, "attention_mask": token_mask(x).to(x["input_ids"])} for x in samples
        ]
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: _joined(name, samples, longest) for name in names}


def _joined(name: str, samples: Sequence[Batch], longest: int) -> torch.Tensor:
    """One field of all samples; zeros where a sample lacks one per token."""
    found = [sample.get(name) for sample in samples]
    model = next(tensor for tensor in found if tensor is not None)
    owner = next(sample for sample in samples if name in sample)
    if not _per_token(owner, model):
        try:
            return torch.cat([tensor for tensor in found if tensor is not None])
        except RuntimeError as error:
            raise ValueError(
                f"calibration samples hold {name!r} of unequal sizes, and the last "
                "comparison takes all samples at once: resize the images, use rows of "
                "text alone, or confirm_samples: 0"
            ) from error
    rows = []
    for sample, tensor in zip(samples, found, strict=True):
        length = sample["input_ids"].shape[1]
        kept = (
            model.new_zeros(1, length, *model.shape[2:]) if tensor is None else tensor
        )
        room = kept.new_zeros(1, longest - length, *kept.shape[2:])
        rows.append(torch.cat([kept, room], dim=1))
    return torch.cat(rows)


def sort_samples(samples: Iterable[Batch]) -> list[dict]:
    """
    Longest first, then by a hash of the tokens: an order that depends on the samples
    alone. So the ones that are held out, or chosen for a signal, are the same whether a
    loader shuffles or not, and however ranks and batches share the samples out.

    :param samples: batches of one sample
    """

    return sorted((dict(sample) for sample in samples), key=sample_key)


def sample_key(sample: Batch) -> tuple[int, bytes]:
    """Minus the number, and a hash, of the tokens of a single sample."""
    tokens = sample["input_ids"][token_mask(sample)].cpu().to(torch.int64)
    return -tokens.numel(), hashlib.sha256(tokens.numpy().tobytes()).digest()


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """`count` items at even distances: loaders may sort samples by length."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def interleaved(items: Sequence[T], stride: int = 8) -> list[T]:
    """All items, reordered so that the first few are evenly_spaced over the whole."""
    stride = max(1, len(items) // stride)
    return [item for offset in range(stride) for item in items[offset::stride]]


def cut_tokens(
    sample: Batch, length: int, salt: str | None = None, first: bool = False
) -> dict:
    """
    A window of `length` tokens of a single sample, that are no padding. A sample with
    images stays whole: their tokens must all be there.

    :param salt: the window lies at a place that a hash of this and of the sample's
        tokens tells; None for its beginning
    :param first: the window begins with the sample's first token wherever it lies: a
        model that was trained with BOS there is not itself without
    """
    if has_media(sample):
        return dict(sample)
    total = sample["input_ids"].shape[1]
    # padding may lie between tokens too, where texts were packed
    real = token_mask(sample)[0].nonzero().flatten()
    room = len(real) - length
    offset = 0
    if salt is not None and room > 0:
        _, content = sample_key(sample)
        digest = hashlib.sha256(salt.encode() + content).digest()
        offset = int.from_bytes(digest[:8], "big") % (room + 1)
    places = real[offset : offset + length].clone()
    # without a mask positions that jump tell a model that another text begins
    if first and ("position_ids" not in sample or "attention_mask" in sample):
        places[0] = real[0]
    return {
        name: tensor[:, places.to(tensor.device)]
        if tensor.dim() > 1 and tensor.shape[1] == total
        else tensor
        for name, tensor in sample.items()
    }


def count_tokens(batch: Batch) -> int:
    """Tokens that are no padding, of all samples of a batch."""
    return int(token_mask(batch).sum())


def padding_share(batches: Iterable[Batch]) -> float:
    """Of all positions, those that are padding."""
    positions, tokens = 0, 0
    for batch in batches:
        positions += batch["input_ids"].numel()
        tokens += count_tokens(batch)
    return 1 - tokens / positions if positions else 0.0


def token_mask(batch: Batch) -> torch.Tensor:
    """True where a token is no padding, bool of shape (batch, tokens)."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != batch["input_ids"].shape:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    return mask.bool()
