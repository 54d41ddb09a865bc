"""Pruned weights that wait to be used: a zero takes a bit."""

from dataclasses import dataclass, replace

import torch

from absorb_plugin.devices import through_page_locked

__all__ = ["HOST", "Packed", "unpacked"]

HOST = torch.device("cpu")
BITS = 8
# Weights at a time, a multiple of BITS: what picking them out takes is several times as
# large, and a whole Linear's would pass what is stated for pruning (forward/memory.py).
CHUNK = 2**24


@dataclass(frozen=True)
class Packed:
    """
    :param bits: of the weights in row order, 1 where one is not zero; 8 to a byte, the
        first in the lowest bit
    :param values: those that are not zero
    :param shape: of the weight
    """

    bits: torch.Tensor
    values: torch.Tensor
    shape: torch.Size

    @classmethod
    def of(cls, weight: torch.Tensor) -> "Packed":
        """Where the weight is."""
        flat = weight.detach().flatten()
        bits = flat.new_empty(-(-len(flat) // BITS), dtype=torch.uint8)
        values = []
        for part, its_bits in zip(flat.split(CHUNK), bits.split(CHUNK // BITS)):
            there = part != 0
            its_bits.copy_(_to_bits(there))
            values.append(part[there])
        return cls(bits, torch.cat(values), weight.shape)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.values.nbytes

    def to(self, device: torch.device) -> "Packed":
        return replace(
            self, bits=_moved(self.bits, device), values=_moved(self.values, device)
        )

    def weight(self) -> torch.Tensor:
        """As it was, where its parts are; of two kinds of zero it has the positive."""
        flat, taken = self.values.new_zeros(self.shape.numel()), 0
        for part, bits in zip(flat.split(CHUNK), self.bits.split(CHUNK // BITS)):
            there = _from_bits(bits)[: len(part)]
            count = int(there.count_nonzero())
            part.masked_scatter_(there, self.values[taken : taken + count])
            taken += count
        return flat.view(self.shape)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    there = through_page_locked(tensor, device)
    return tensor.to(device) if there is None else there


def unpacked(weight: torch.Tensor | Packed) -> torch.Tensor:
    """Of a weight that may be packed, where it is."""
    return weight.weight() if isinstance(weight, Packed) else weight


def _places(device: torch.device) -> torch.Tensor:
    return 2 ** torch.arange(BITS, dtype=torch.uint8, device=device)


def _to_bits(flags: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(flags, (0, -len(flags) % BITS)).view(-1, BITS)
    return (padded * _places(flags.device)).sum(dim=1, dtype=torch.uint8)


def _from_bits(bits: torch.Tensor) -> torch.Tensor:
    return (bits[:, None] & _places(bits.device)).flatten() != 0
