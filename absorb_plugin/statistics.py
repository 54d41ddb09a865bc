"""Statistics of the Linears' inputs, gathered while a sweep passes by."""

import functools
from collections.abc import Callable, Mapping

import torch
from compressed_tensors.offload import get_execution_device
from torch.nn import Module

from absorb_plugin import distributed
from absorb_plugin.allocators.base import LinearGroup, LinearStatistics, Remember
from absorb_plugin.blocks import BlockMap, linear_parameters
from absorb_plugin.calibration import Batch, token_mask
from absorb_plugin.sweep import Passenger, RunBlock

__all__ = ["InputStatistics", "groups_of", "unseen_linears"]


# Tokens squared at a time: what stays in a CPU's cache.
ROWS = 1024


class InputStatistics(Passenger):
    """
    Passenger of a sweep that adds up Σ x_j² over the tokens that enter each Linear.

    Its hooks are registered at a block's entry and removed before any other trajectory
    runs through it, so only the model's own pass is counted.

    :param blocks: whose prunable Linears to watch
    :param rank: columns of a random sketch of XᵀX to gather beside its diagonal; 0 for
        none
    """

    kept = ("_sums", "_sketches", "_samples")

    def __init__(self, blocks: BlockMap, rank: int = 0) -> None:
        self._blocks, self._rank = blocks, rank
        self._sketches: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._samples = 0
        self._handles: list = []
        self._seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

    def start(self, batch: Batch) -> None:
        self._mask = token_mask(batch)
        self._samples += len(self._mask)

    def enter(self, index: int, block: Module) -> None:
        watched = self._blocks.blocks[index]
        for name, linear in watched.linears.items():
            self._watch(watched.full_name(name), linear)

    def leave(
        self, index: int, before: torch.Tensor, after: torch.Tensor, run: RunBlock
    ) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen = None

    def input_square_sums(self) -> dict[str, torch.Tensor]:
        """Full name of a Linear -> a_j, mean over samples of Σ_tokens x_j²."""
        return self._means(self._sums)

    def factors(self) -> dict[str, torch.Tensor]:
        """
        Full name of a Linear -> U, shape (in_features, rank), with UUᵀ the Nyström
        approximation of XᵀX, of the same scale as a_j.
        """
        factors = {}
        for name, sketch in self._means(self._sketches).items():
            core = _directions(len(sketch), self._rank).to(sketch).T @ sketch
            values, vectors = torch.linalg.eigh((core + core.T).double() / 2)
            # what float32 sums cannot tell from zero is left out
            kept = values > 1e-6 * values[-1]
            scale = torch.where(kept, values, torch.inf).rsqrt()
            factors[name] = (sketch.double() @ (vectors * scale)).float()
        return factors

    def _means(self, sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        samples = sum(distributed.gather(self._samples))
        means = {name: total / samples for name, total in distributed.add(sums).items()}
        for name, linear in self._blocks.linears().items():
            if name in means and name not in sums:  # other ranks saw tokens
                means[name] = means[name].to(get_execution_device(linear))
        return means

    def _watch(self, name: str, linear: torch.nn.Linear) -> None:
        def add(module: Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if not x.numel():  # an expert that no token was routed to
                return
            if self._seen is None or self._seen[0] is not x:
                # queries, keys and values are made of one input
                self._seen = (x, *self._moments(x))
            _, square_sum, sketch = self._seen
            self._sums[name] = square_sum + self._sums.get(name, 0.0)
            if sketch is not None:
                self._sketches[name] = sketch + self._sketches.get(name, 0.0)

        self._handles.append(linear.register_forward_pre_hook(add))

    def _moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Over tokens that are no padding Σ x², float32 of shape (in_features,), and
        Σ x xᵀΩ, shape (in_features, rank).
        """
        rows, mask = x.flatten(0, -2), self._mask.flatten().to(x.device)
        # Experts of a mixture get fewer tokens, and padding among them cannot be told
        # apart.
        if len(rows) != len(mask):
            mask = mask.new_ones(len(rows))
        width = x.shape[-1]
        total = torch.zeros(width, dtype=torch.float32, device=x.device)
        sketch = directions = None
        if self._rank:
            directions = _directions(width, self._rank).to(x.device)
            sketch = torch.zeros_like(directions)
        for part, kept in zip(rows.split(ROWS), mask.split(ROWS), strict=True):
            part, kept = part.float(), kept.float()
            total += kept @ part.square()
            if sketch is not None:
                sketch += part.T @ (kept[:, None] * (part @ directions))
        return total, sketch


@functools.cache
def _directions(width: int, rank: int) -> torch.Tensor:
    """Ω, the same in every run and on every rank, shape (width, min(width, rank))."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(width, min(width, rank), generator=generator)
    return torch.linalg.qr(gaussian).Q


def unseen_linears(
    blocks: BlockMap, input_square_sums: Mapping[str, torch.Tensor]
) -> list[str]:
    """
    Full names of the prunable Linears that saw no token: experts never routed to.

    :param input_square_sums: from `InputStatistics`
    """
    return [name for name in blocks.linears() if name not in input_square_sums]


def groups_of(
    blocks: BlockMap,
    input_square_sums: Mapping[str, torch.Tensor],
    granularity: str = "block",
    remember: Callable[[str], Remember] | None = None,
) -> list[LinearGroup]:
    """
    What an allocator ranks: one group per prunable block or per prunable Linear.

    :param input_square_sums: from `InputStatistics`, or empty; a Linear that saw no
        token (an expert never routed to) has zeros
    :param remember: full name of a Linear -> what its `LinearStatistics.remember` is
    """
    remembering = {}
    if remember is not None:
        remembering = {name: {"remember": remember(name)} for name in blocks.linears()}
    groups = []
    for index in blocks.prunable:
        block = blocks.blocks[index]
        statistics = {
            name: LinearStatistics(
                linear,
                input_square_sums.get(
                    block.full_name(name), torch.zeros(linear.in_features)
                )
                if input_square_sums
                else None,
                **remembering.get(block.full_name(name), {}),
            )
            for name, linear in block.linears.items()
        }
        if granularity == "block":
            groups.append(LinearGroup(block.name, statistics, block.parameters))
        else:
            groups += [
                LinearGroup(
                    block.full_name(name),
                    {name: statistics[name]},
                    linear_parameters(linear),
                )
                for name, linear in block.linears.items()
            ]
    return groups
