"""Pruned weights that wait to be used: a zero takes a bit."""

from dataclasses import dataclass, replace

import torch

from absorb_plugin.devices import page_locked

__all__ = ["Packed", "unpacked"]

BITS = 8


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
        there = flat != 0
        padded = torch.nn.functional.pad(there, (0, -len(there) % BITS))
        places = 2 ** torch.arange(BITS, dtype=torch.uint8, device=flat.device)
        bits = (padded.view(-1, BITS) * places).sum(dim=1, dtype=torch.uint8)
        return cls(bits, flat[there], weight.shape)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.values.nbytes

    def to(self, device: torch.device) -> "Packed":
        bits, values = (
            page_locked(tensor, device).to(device)
            for tensor in (self.bits, self.values)
        )
        return replace(self, bits=bits, values=values)

    def weight(self) -> torch.Tensor:
        """As it was, where its parts are; of two kinds of zero it has the positive."""
        places = 2 ** torch.arange(BITS, dtype=torch.uint8, device=self.device)
        there = (self.bits[:, None] & places).flatten()[: self.shape.numel()] != 0
        flat = self.values.new_zeros(self.shape.numel())
        return flat.masked_scatter_(there, self.values).view(self.shape)


def unpacked(weight: torch.Tensor | Packed) -> torch.Tensor:
    """Of a weight that may be packed, where it is."""
    return weight.weight() if isinstance(weight, Packed) else weight
