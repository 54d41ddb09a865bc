"""Cross-entropy of a hidden state behind the last block, in bounded memory."""

from collections.abc import Callable

import torch

from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.sweep import Tail

__all__ = ["check_predicted", "cross_entropy_sums"]


def cross_entropy_sums(
    tail: Tail,
    batch: Batch,
    hidden: torch.Tensor,
    each_chunk: Callable[[torch.Tensor], None] | None = None,
) -> list[tuple[float, int]]:
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
    total = torch.zeros(samples, dtype=torch.float64, device=hidden.device)
    step = max(1, tail.chunk_bytes // (4 * tail.vocabulary * samples))
    for start in range(0, tokens - 1, step):
        stop = min(start + step, tokens - 1)
        logits = tail.logits(ids, hidden, start, stop)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1),
            ids[:, start + 1 : stop + 1].flatten(),
            reduction="none",
        ).view(samples, -1)
        kept = counted[:, start:stop].to(losses.device)
        sums = torch.where(kept, losses, 0.0).double().sum(dim=1)
        if each_chunk is not None:
            each_chunk(sums.sum())
        total += sums.detach().to(total.device)
    return list(zip(total.tolist(), counted.sum(dim=1).tolist(), strict=True))


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
