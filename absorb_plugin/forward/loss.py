"""Cross-entropy of a hidden state after the last block, in bounded memory."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from compressed_tensors.offload import disable_offloading

from absorb_plugin import distributed
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.forward.head import OutputHead
from absorb_plugin.precision import widest_float

__all__ = [
    "check_predicted",
    "cross_entropy_sums",
    "gathered_losses",
    "loss_gradient",
    "score_states",
]

Losses = list[tuple[float, int]]


def cross_entropy_sums(
    head: OutputHead,
    batch: Batch,
    hidden: torch.Tensor,
    each_chunk: Callable[[torch.Tensor], None] | None = None,
) -> Losses:
    """
    Next-token cross-entropy per sample, in nats. Sum and count are kept apart, so that
    batches and ranks can be added before the division.

    :param hidden: output of the last block, shape (batch, tokens, hidden)
    :return: per sample (sum over predicted tokens, number of predicted tokens); a
        token counts if it and the one before are no padding
    :param each_chunk: called with the summed loss of every chunk, to differentiate it
        before the next chunk's logits are made
    """
    ids, mask = batch["input_ids"], token_mask(batch)
    samples, tokens = ids.shape
    counted = mask[:, 1:] & mask[:, :-1]
    for placeholder in head.placeholders:
        counted = counted & (ids[:, 1:] != placeholder)
    wide = widest_float(hidden.device)
    total = torch.zeros(samples, dtype=wide, device=hidden.device)
    step = max(1, head.chunk_bytes // (4 * head.vocabulary * samples))
    for start in range(0, tokens - 1, step):
        stop = min(start + step, tokens - 1)
        logits = head.logits(ids, hidden, start, stop)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1),
            ids[:, start + 1 : stop + 1].flatten().to(logits.device),
            reduction="none",
        ).view(samples, -1)
        kept = counted[:, start:stop].to(losses.device)
        sums = torch.where(kept, losses, 0.0).sum(dim=1, dtype=wide)
        if each_chunk is not None:
            each_chunk(sums.sum())
        total += sums.detach().to(total.device)
    return list(zip(total.tolist(), counted.sum(dim=1).tolist(), strict=True))


def score_states(
    head: OutputHead, batch: Batch, states: Sequence[torch.Tensor]
) -> tuple[list[list[float]], list[int]]:
    """
    :param states: outputs of the last block, one per trajectory
    :return: per sample the losses of all trajectories, and its predicted tokens
    """
    with disable_offloading():  # the head, once for all of them
        scored = [cross_entropy_sums(head, batch, state) for state in states]
    losses = [[total for total, _ in sample] for sample in zip(*scored, strict=True)]
    return losses, [count for _, count in scored[0]]


def gathered_losses(
    losses: list[list[float]], tokens: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """
    What `score_states` said of this rank's samples, of those of all ranks.

    :return: sums of cross-entropy in nats, shape (trajectories, samples), and numbers
        of predicted tokens, shape (samples,)
    :raises ValueError: if no token is predicted
    """
    losses = distributed.gather_shares(losses)
    tokens = distributed.gather_shares(tokens)
    check_predicted(sum(tokens))
    return np.array(losses).T, np.array(tokens)


def loss_gradient(
    head: OutputHead, batch: Batch, hidden: torch.Tensor
) -> tuple[Losses, torch.Tensor]:
    """Cross-entropy sums per sample, and the gradient of their total in `hidden`."""
    leaf = hidden.detach().requires_grad_()
    total = torch.zeros_like(leaf)

    def accumulate(loss: torch.Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, leaf)
        total.add_(gradient)

    with torch.enable_grad(), disable_offloading():  # the head, once for all chunks
        losses = cross_entropy_sums(head, batch, leaf, accumulate)
    return losses, total


def check_predicted(tokens: int) -> int:
    """
    :param tokens: number of predicted tokens over all samples
    :raises ValueError: if there is none, and so no loss
    """
    if not tokens:
        raise ValueError(
            "the calibration samples have no token to predict: each needs two "
            "neighbouring tokens that are no padding. Use longer samples"
        )
    return tokens
