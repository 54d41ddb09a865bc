"""
Cholesky factors of Hessians, made by one rank or, of wide ones, by all that there are.

A matrix of 28,672 columns, as before a 70B model's down projections, is factored by
fourteen times as many operations as all others of its block take, and whoever waits for
it waits for one rank. So its columns are cut into panels, from the last to the first.
A panel is broadcast when all that come before it have been taken off; every rank
factors it, and takes it off the panels that are its own, an n-th of the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from absorb_plugin import distributed

__all__ = ["Factor", "factored", "factored_together"]

PANEL = 1024  # columns


@dataclass(frozen=True)
class Factor:
    """
    T of a Hessian H = T Tᵀ, dampened.

    :param triangle: T, (in_features, in_features), float32; what is below its diagonal
        means nothing
    :param unused: True where a feature is always zero, (in_features,)
    """

    triangle: torch.Tensor
    unused: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.triangle.shape


def factored(
    hessian: torch.Tensor, dampening: float, out: torch.Tensor | None = None
) -> Factor:
    """
    :param hessian: (in_features, in_features), float32
    :param dampening: relative to the mean of its diagonal
    :param out: where to put the triangle
    """
    # upper factors are the lower ones of a matrix that is turned round
    turned = hessian.flip(0, 1)
    diagonal, unused = _dampened(turned.diagonal(), dampening)
    turned.diagonal().copy_(diagonal)
    try:
        lower = torch.linalg.cholesky(turned)
    except torch.linalg.LinAlgError:
        # as llm-compressor does, which warns of it in the run itself
        lower = torch.eye(len(turned), device=turned.device)
    del turned, diagonal
    triangle = torch.empty_like(lower) if out is None else out
    return Factor(triangle.copy_(lower.flip(0, 1)), unused.flip(0))


def factored_together(
    own: torch.Tensor, dampening: float, keep: bool = True
) -> Factor | None:
    """
    Of the sum over the ranks. Within `distributed.fail_together`.

    :param own: this rank's summand, float32; it is written over
    :param keep: whether this rank is to have the factor
    """
    size, rank, ranks = len(own), distributed.rank(), distributed.ranks()
    panels = list(_panels(size))
    summands = {n: own[:stop, start:stop] for n, (start, stop) in enumerate(panels)}
    # all memory is there before the others wait for this rank
    kept = [(n, x.shape) for n, x in summands.items() if n % ranks == rank]
    mine = {number: own.new_empty(shape) for number, shape in kept}
    room = own.new_empty(3, size * min(PANEL, size))
    # what a factor takes for itself
    _factor_panel(torch.eye(min(PANEL, size), device=own.device), room)
    distributed.meet()
    diagonal = distributed.add({"": own.diagonal()})[""]
    diagonal, unused = _dampened(diagonal, dampening)
    for number, summand in summands.items():
        start, stop = panels[number]
        owner = number % ranks
        panel = mine[number] if owner == rank else _within(room[0], summand)
        total = distributed.add_to(panel.copy_(summand), owner)
        if total is not None:
            panel.copy_(total)
            panel[start:stop].diagonal().copy_(diagonal[start:stop])
    failed = torch.zeros((), dtype=torch.bool, device=own.device)
    for number, summand in summands.items():
        panel = mine.pop(number) if number in mine else _within(room[0], summand)
        distributed.broadcast_in_place(panel, number % ranks)
        failed |= _factor_panel(panel, room[1:])
        for later, other in mine.items():
            start, stop = panels[later]
            other.addmm_(panel[:stop], panel[start:stop].mT, alpha=-1)
        if keep:
            summand.copy_(panel)
    if not keep:
        return None
    if bool(failed):  # as `factored`
        own.zero_().fill_diagonal_(1)
    return Factor(own, unused)


def _dampened(
    diagonal: torch.Tensor, dampening: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """:return: the diagonal, with ones where it is zero, and where that is"""
    unused = diagonal == 0
    diagonal = diagonal.masked_fill(unused, 1)
    return diagonal + dampening * diagonal.mean(), unused


def _panels(size: int) -> Iterator[tuple[int, int]]:
    """First column and the one after the last of every panel."""
    for stop in range(size, 0, -PANEL):
        yield max(0, stop - PANEL), stop


def _within(room: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return room[: like.numel()].view(like.shape)


def _factor_panel(panel: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """
    What is left of some columns of H becomes those of T, in place.

    :param panel: down to its own part of the diagonal: (rows, columns)
    :param room: two of the panel's size
    :return: whether that has no factor
    """
    rows, columns = panel.shape
    above, own = panel[: rows - columns], panel[rows - columns :]
    lower, info = torch.linalg.cholesky_ex(own.flip(0, 1))
    own.copy_(lower.flip(0, 1))
    if len(above):
        solved, taken = (_within(one, above) for one in room)
        taken.copy_(above)
        solve = torch.linalg.solve_triangular  # `taken` into `solved`
        above.copy_(solve(own.mT, taken, upper=False, left=False, out=solved))
    return info != 0
