"""
What becomes of the zeros that pruning made: later modifiers of a recipe may fill them.
They are compared with what is there at the end, whatever the modifiers are.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from compressed_tensors.offload import align_module_device
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from loguru import logger
from torch.nn import Linear

from absorb_plugin.compressed import dense_weight
from absorb_plugin.pruners.adapter import PrunerAdapter
from absorb_plugin.pruners.wrapped import unwrap, wrap

__all__ = ["PrunedZeros", "at_the_end"]


class PrunedZeros:
    """
    Where a pruning modifier left zeros, one bit per weight on the CPU. Nothing is kept
    where the recipe holds nothing else that could fill them.

    :param adapter: the pruning modifier
    """

    def __init__(self, adapter: PrunerAdapter) -> None:
        self._adapter = adapter
        self._names = {id(x): name for name, x in adapter.blocks.linears().items()}
        self._zeros: dict[str, np.ndarray] = {}

    def watch(self) -> None:
        """Until `unwrap` note what `compress_modules` of the modifier makes zero."""
        if _others():
            wrap(self._adapter.modifier, "compress_modules", self._compress)

    def lost(self) -> float | None:
        """Share of the zeros that are none any more; None if none were noted."""
        pruned, filled = 0, 0
        for name, linear in self._adapter.blocks.linears().items():
            if name in self._zeros:
                weight = final_weight(linear).detach().cpu()
                bits = np.unpackbits(self._zeros[name], count=weight.numel())
                zero = torch.from_numpy(bits).view(weight.shape).bool()
                pruned += int(zero.count_nonzero())
                filled += int((weight[zero] != 0).count_nonzero())
        return filled / pruned if pruned else None

    def warn(self) -> None:
        """Say how many are lost, if any are."""
        if not (lost := self.lost()):
            return
        logger.warning(
            f"{lost:.2%} of the zeros that {self._adapter.name} made are filled at the "
            f"end of the recipe, by {' or '.join(_others())}: the model is less sparse "
            "than asked for. Put what changes weights before the pruning modifier; "
            "QuantizationModifier keeps every zero"
        )

    def _compress(self, original: Callable[[], None]) -> None:
        modifier = self._adapter.modifier
        seen = list(modifier._num_samples)
        original()
        for module in seen:
            name = self._names.get(id(module))
            if name is not None:
                zero = (module.weight.detach() == 0).cpu().numpy()
                self._zeros[name] = np.packbits(zero)


def final_weight(linear: Linear) -> torch.Tensor:
    """
    The weight that is saved: dequantised where a modifier has quantised it.
    """
    scheme = getattr(linear, "quantization_scheme", None)
    weights = getattr(scheme, "weights", None)
    if weights is None or linear.quantization_status == QuantizationStatus.COMPRESSED:
        return dense_weight(linear)
    with align_module_device(linear):
        return forward_quantize(linear, linear.weight, "weight", weights)


def at_the_end(modifier: Modifier, call: Callable[[], None]) -> None:
    """
    Call when the last modifier of the recipe has been finalised.

    :param modifier: ours, in whose `on_finalize` this is called
    """
    last = active_session().lifecycle.recipe.modifiers[-1]
    if last is modifier:
        call()
        return

    def finalize(original: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        unwrap(last, "finalize")
        done = original(*args, **kwargs)
        call()
        return done

    wrap(last, "finalize", finalize)


def _others() -> list[str]:
    """Modifiers of the recipe that are no pruners and not ours."""
    return [
        type(modifier).__name__
        for modifier in active_session().lifecycle.recipe.modifiers
        if not isinstance(modifier, SparsityModifierBase)
        and not type(modifier).__module__.startswith("absorb_plugin")
    ]
