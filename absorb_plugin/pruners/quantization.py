"""
What a quantisation that follows in the recipe will make of pruned Linears.

llm-compressor gives modules their schemes before anything is calibrated, and leaves
them switched off until then. Here they are applied to a block for a while: weights are
rounded to nearest between the least and the largest of those that share a scale, as
QuantizationModifier does by default, and inputs as the saved model will round them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)
from compressed_tensors.utils import match_named_modules
from llmcompressor.observers.helpers import flatten_for_calibration
from torch.nn import Linear, Module
from torch.nn.functional import linear as apply_linear

from absorb_plugin import distributed
from absorb_plugin.blocks import BlockMap
from absorb_plugin.forward.linears import watched_inputs
from absorb_plugin.forward.replaced import replaced_forward

__all__ = ["QuantizedLinears", "Range", "is_quantized", "rounded_input"]
__all__ += ["rounded_weight", "unjudged"]

# Weights that are rounded at once, of which there are several copies on the way, where
# rows have scales of their own.
AT_ONCE = 2**24
BY_ROWS = (QuantizationStrategy.CHANNEL, QuantizationStrategy.GROUP)
# The least and the largest of what entered a Linear.
Range = tuple[float, float]


@dataclass(frozen=True)
class QuantizedLinears:
    """
    :param modifiers: class names of what quantises, or prepares it
    :param schemes: per block, name relative to it -> how that Linear will be quantised
    """

    modifiers: tuple[str, ...]
    schemes: Sequence[Mapping[str, QuantizationScheme]]

    @property
    def better(self) -> str:
        """Those that do more than round to nearest, in words; "" if none does."""
        return " and ".join(x for x in self.modifiers if x != "QuantizationModifier")

    @classmethod
    def of(cls, modifiers: Iterable[str], blocks: BlockMap) -> "QuantizedLinears":
        """By the schemes that the blocks' Linears have, prunable or not."""
        schemes = [
            {
                name: part.quantization_scheme
                for name, part in block.named_modules()
                if isinstance(part, Linear) and is_quantized(part)
            }
            for block in blocks.modules
        ]
        return cls(tuple(modifiers), schemes)

    @classmethod
    def to_be(
        cls, config: QuantizationConfig, model: Module, blocks: BlockMap, name: str
    ) -> "QuantizedLinears":
        """
        By the schemes that a configuration will give them.

        :param name: of what quantises
        """
        given = {
            module: scheme
            for scheme in config.config_groups.values()
            for _, module in match_named_modules(model, scheme.targets, config.ignore)
        }
        schemes = [
            {
                name: given[part]
                for name, part in block.named_modules()
                if isinstance(part, Linear) and part in given
            }
            for block in blocks.modules
        ]
        return cls((name,), schemes)

    def identity(self) -> list[dict[str, str]]:
        """What tells a measurement by these from another (`profile_cache`)."""
        return [
            {name: scheme.model_dump_json() for name, scheme in block.items()}
            for block in self.schemes
        ]

    @contextmanager
    def noting_ranges(self, index: int, block: Module) -> Iterator[dict[str, Range]]:
        """
        Within the context what enters the Linears of a block is looked at, of those
        whose inputs get a scale once and for all. What is yielded is filled meanwhile.
        """
        found: dict[str, Range] = {}

        def note(name: str, x: torch.Tensor) -> None:
            if x.numel():
                low, high = (float(one) for one in torch.aminmax(x))
                least, largest = found.get(name, (low, high))
                found[name] = min(least, low), max(largest, high)

        static: dict[str, Any] = {
            name: block.get_submodule(name)
            for name, scheme in self.schemes[index].items()
            if scheme.input_activations is not None
            and scheme.input_activations.dynamic is not True
        }
        with watched_inputs(static, note):
            yield found
        if static:  # on all ranks, or on none
            found.update(_of_all_ranks(found))

    @contextmanager
    def applied(
        self,
        index: int,
        block: Module,
        weights: Mapping[str, torch.Tensor],
        ranges: Mapping[str, Range],
    ) -> Iterator[None]:
        """
        Within the context a block computes as it will once it is quantised.

        :param weights: of its Linears that are pruned, by relative name, in place of
            their own
        :param ranges: as of `noting_ranges`; an input without one is not rounded
        """
        schemes = self.schemes[index]
        with ExitStack() as stack:
            for name, scheme in schemes.items():
                linear: Any = block.get_submodule(name)
                rounded = partial(
                    _apply, linear, weights.get(name), scheme, ranges.get(name)
                )
                stack.enter_context(replaced_forward(linear, rounded))
            for name in weights.keys() - schemes.keys():
                linear = block.get_submodule(name)
                plain = partial(_apply, linear, weights[name], None, None)
                stack.enter_context(replaced_forward(linear, plain))
            yield


def unjudged(model: Module, blocks: BlockMap) -> list[str]:
    """
    Names of what will be quantised and is no input or weight of a block's Linear: an
    output head, embeddings, keys and values, outputs.
    """
    inside = {part for block in blocks.modules for part in block.modules()}
    return [
        name
        for name, part in model.named_modules()
        if (is_quantized(part) and not (part in inside and isinstance(part, Linear)))
        or _rounds_outputs(part)
    ]


def _apply(
    linear: Linear,
    weight: torch.Tensor | None,
    scheme: QuantizationScheme | None,
    seen: Range | None,
    x: torch.Tensor,
) -> torch.Tensor:
    weight = linear.weight if weight is None else weight
    if scheme is not None and scheme.weights is not None:
        weight = rounded_weight(weight, scheme.weights)
    if scheme is not None and scheme.input_activations is not None:
        x = rounded_input(x, scheme.input_activations, seen)
    return apply_linear(x, weight.to(x.device), linear.bias)


def rounded_weight(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """
    :param weight: shape (out_features, in_features)
    :return: likewise, quantised and dequantised
    """
    rows = max(1, AT_ONCE // weight.shape[1])
    if args.strategy not in BY_ROWS or len(weight) <= rows:
        return _rounded(weight, args)
    rounded = torch.empty_like(weight)
    for part, source in zip(rounded.split(rows), weight.split(rows), strict=True):
        part.copy_(_rounded(source, args))
    return rounded


def _rounded(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    together = flatten_for_calibration(weight, "weight", args)
    low, high = together.amin((0, -1)), together.amax((0, -1))
    whole = None
    if args.strategy == QuantizationStrategy.TENSOR_GROUP:
        # llm-compressor has one for q, k and v, which moves the scales' last digits
        whole = generate_gparam(low.min().reshape(1), high.max().reshape(1))
    scale, zero_point = calculate_qparams(low, high, args, global_scale=whole)
    return fake_quantize(weight, scale, zero_point, args, global_scale=whole)


def rounded_input(
    x: torch.Tensor, args: QuantizationArgs, seen: Range | None
) -> torch.Tensor:
    """
    :param x: shape (..., in_features)
    :param seen: of other inputs, for a scale that does not depend on `x`; without it
        and without a token nothing is rounded
    """
    if not x.numel() or (seen is None and args.dynamic is not True):
        return x
    whole = None
    if args.dynamic is True:
        scale, zero_point = _of_tokens(x, args)
    else:
        low, high = (x.new_tensor([one]) for one in seen or ())
        if args.strategy == QuantizationStrategy.TENSOR_GROUP:
            whole = generate_gparam(low, high)
            scale, zero_point = _of_tokens(x, args, whole)
        else:
            scale, zero_point = calculate_qparams(low, high, args)
    return fake_quantize(x, scale, zero_point, args, global_scale=whole)


def _of_tokens(
    x: torch.Tensor, args: QuantizationArgs, whole: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return compute_dynamic_scales_and_zp(x, args, Module(), global_scale=whole)


def _of_all_ranks(mine: Mapping[str, Range]) -> dict[str, Range]:
    found: dict[str, Range] = {}
    for ranges in distributed.meet(dict(mine)):
        for name, (low, high) in ranges.items():
            least, largest = found.get(name, (low, high))
            found[name] = min(least, low), max(largest, high)
    return found


def _rounds_outputs(module: Module) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return getattr(scheme, "output_activations", None) is not None


def is_quantized(module: Module) -> bool:
    """Whether it has a scheme for its weight or its inputs, in force or not."""
    scheme = getattr(module, "quantization_scheme", None)
    parts = ("weights", "input_activations")
    return any(getattr(scheme, part, None) is not None for part in parts)
