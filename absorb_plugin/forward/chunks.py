"""Rows of one Linear's weight that are worked on at a time."""

from collections.abc import Iterator

import torch

__all__ = ["CHUNK_BYTES", "row_chunks"]

# Of what is made of weights in float32, scores and differences, so much at a time.
CHUNK_BYTES = 64 * 2**20


def row_chunks(matrix: torch.Tensor) -> Iterator[slice]:
    """
    Slices that cover all rows: of `CHUNK_BYTES` in float32 at most, or one row. Of a
    matrix without rows, which a rank may have as its share, one that is empty.
    """
    rows, columns = matrix.shape
    step = max(1, CHUNK_BYTES // (4 * max(1, columns)))
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))
