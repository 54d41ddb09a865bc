"""
The scores at which a mask begins.

A mask of a sparsity needs one number per row (Wanda) or per group of columns
(SparseGPT), not the sorted scores. What is held beside the weights here is a chunk of
one Linear's rows, whatever the size of the block.

Which primitive finds the number, per device:

- rows on a CPU: numpy, which selects and sorts with vector instructions. For one count
  `partition` takes half the time of `sort`, for several counts one sort takes less than
  they would (float32, rows of 1,536 and of 4,096, with AVX-512 and with AVX2); torch's
  own `kthvalue` takes 6 times as long as `sort`, torch's `sort` 20 times
- rows on an accelerator: for one count `kthvalue`, whose radix selection gives each row
  a thread block of its own; for several counts one `sort`
- a whole tensor on a CPU: numpy's `partition`
- a whole tensor on an accelerator: `sort`, of a large one after all but a twentieth is
  ruled out by a sample of it. There `kthvalue` sees a single row, so one thread block
  does all the work (pytorch#75599: 100 M elements, 0.68 s against 0.03 s)

The choices for accelerators follow from the source and that report. integration/
gpu_check.py times both primitives on the card at hand.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch

from absorb_plugin.forward.chunks import row_chunks

__all__ = [
    "global_threshold",
    "row_quantiles",
    "row_thresholds",
    "thresholds_between",
]

# Parts of a row's ranks, between which its scores are searched again.
LEVELS = 64
# So many scores, at even distances, tell where in a larger tensor to look for a rank:
# as far to both sides as six standard deviations of how many of them precede it.
SAMPLE = 2**14
MARGIN = 6 * 2**6
SAMPLED_FROM = 2**19


def row_thresholds(scores: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """
    The n-th smallest score of every row, for several n at once. Scores that are no
    greater are at least n.

    :param scores: (rows, columns), float32
    :param counts: each n in 0 … columns; 0 gives −∞, below every score
    :return: (rows, len(counts)), on the device of `scores`
    :raises ValueError: if a count is out of range
    """
    rows, columns = scores.shape
    wrong = [count for count in counts if not 0 <= count <= columns]
    if wrong:
        raise ValueError(f"counts {wrong} are not in 0 … {columns}, the row's length")
    found = scores.new_full((rows, len(counts)), -torch.inf)
    wanted = sorted({count for count in counts if count})
    for chunk in row_chunks(scores) if wanted else ():
        smallest = _smallest(scores[chunk], wanted)
        for position, count in enumerate(counts):
            if count:
                found[chunk, position] = smallest[wanted.index(count)]
    return found


def row_quantiles(scores: torch.Tensor) -> torch.Tensor:
    """
    What to keep of rows whose thresholds are asked for again and again, at other counts
    each time: the scores at evenly spaced ranks, of which the first is −∞.

    :param scores: (rows, columns), float32
    :return: (rows, LEVELS + 1) or fewer columns, on the device of `scores`
    """
    return row_thresholds(scores, _ranks(scores.shape[1]))


def thresholds_between(
    scores: torch.Tensor, quantiles: torch.Tensor, counts: Sequence[int]
) -> torch.Tensor:
    """
    As `row_thresholds`, and equal to it; but each row is not ranked again: the few
    scores between two quantiles are picked out and ranked.

    :param quantiles: of these very scores, from `row_quantiles`
    """
    ranks, found = _ranks(scores.shape[1]), []
    for count in counts:
        level = bisect_left(ranks, count)
        if ranks[level] == count:
            found.append(quantiles[:, level])
            continue
        between = ranks[level] - ranks[level - 1]
        above = scores > quantiles[:, level - 1, None]
        inside = above & (scores <= quantiles[:, level, None])
        # as many equal scores beyond either quantile would make one number right
        exact = above.sum(dim=1) == scores.shape[1] - ranks[level - 1]
        exact &= inside.sum(dim=1) == between
        if bool(exact.all()):
            # the slice is the whole, but known without looking at the data
            rows = len(scores)
            picked = scores[inside][: rows * between].view(rows, between)
            found.append(_smallest(picked, [count - ranks[level - 1]])[0])
        else:  # equal scores on both sides of a quantile
            found.append(_smallest(scores, [count])[0])
    return torch.stack(found, dim=1)


def global_threshold(scores: torch.Tensor, rank: int) -> torch.Tensor:
    """
    The score that `rank` others precede when all are sorted.

    :param scores: float32, of any shape
    :param rank: counted from 0
    :return: a scalar tensor on the device of `scores`
    :raises ValueError: if there is no such rank
    """
    if not 0 <= rank < scores.numel():
        raise ValueError(f"rank {rank} is not in 0 … {scores.numel() - 1}")
    flat = scores.detach().flatten()
    if flat.device.type == "cpu":
        return scores.new_tensor(np.partition(flat.numpy(), rank)[rank])
    if len(flat) >= SAMPLED_FROM:
        picked, place = _near(flat, rank)
        if 0 <= place < len(picked):  # else the sample is unlike the whole
            return picked.sort().values[place]
    return flat.sort().values[rank]


def _near(scores: torch.Tensor, rank: int) -> tuple[torch.Tensor, int]:
    """
    The scores among which that of a rank should be, and its rank among them.

    :param scores: of one dimension, more than SAMPLE
    """
    # an odd distance, or of a matrix the same rows would be seen again and again
    sample = scores[:: len(scores) // SAMPLE | 1].sort().values
    middle = rank * len(sample) // len(scores)
    low, high = middle - MARGIN, middle + MARGIN
    least = sample[low] if low >= 0 else -torch.inf
    most = sample[high] if high < len(sample) else torch.inf
    picked = scores[(scores >= least) & (scores <= most)]
    return picked, rank - int((scores < least).sum())


def _smallest(scores: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """Per count the count-th smallest of every row, each of shape (rows,)."""
    if scores.device.type != "cpu":
        if len(counts) == 1:
            return [scores.kthvalue(counts[0], dim=1).values]
        ranked = scores.sort(dim=1).values
        return [ranked[:, count - 1] for count in counts]
    values = scores.detach().numpy()
    if len(counts) == 1:
        parted = np.partition(values, counts[0] - 1, axis=1)
    else:
        parted = np.sort(values, axis=1)
    return [torch.from_numpy(parted[:, count - 1]) for count in counts]


def _ranks(columns: int) -> list[int]:
    return sorted({columns * level // LEVELS for level in range(LEVELS + 1)})
