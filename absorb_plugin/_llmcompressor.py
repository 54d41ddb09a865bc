"""
The first import of llm-compressor, and what its versions name differently. While it is
imported it logs to stdout (that there is no accelerator), where `absorb eval --json`
promises one JSON object and no more.
"""

import contextlib
import copy
import sys

if "llmcompressor" not in sys.modules:
    with contextlib.redirect_stdout(sys.stderr):
        import llmcompressor
    # Its log stays where it would be without us.
    llmcompressor.configure_logger()

from llmcompressor.modifiers import ModifierFactory
from torch.nn import Module
from transformers import PretrainedConfig, PreTrainedModel

try:
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
    from llmcompressor.modeling.moe.linearize import (
        get_non_linearized_moes,
        linearize_moe,
    )

    LINEAR_EXPERTS: tuple[type[Module], ...] = (LinearExperts2D,)
except ModuleNotFoundError:  # 0.11, whose transformers 4 has experts of Linears

    def linearize_moe(model: PreTrainedModel) -> None:
        pass

    def get_non_linearized_moes(model: Module) -> list[tuple[str, Module]]:
        return []

    LINEAR_EXPERTS = ()


try:
    from llmcompressor.modeling.moe.context import (
        get_calibrate_all_experts_flag,
        moe_calibration_context,
    )
except ModuleNotFoundError:  # 0.11

    def get_calibrate_all_experts_flag() -> bool:
        return False

    def moe_calibration_context() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


__all__ = [
    "ModifierFactory",
    "fused_experts",
    "get_calibrate_all_experts_flag",
    "linear_experts",
    "linearize_moe",
    "made_linear",
    "moe_calibration_context",
]


def fused_experts(model: Module) -> dict[str, Module]:
    """Name -> experts in one tensor each, which llm-compressor makes Linears of."""
    return dict(get_non_linearized_moes(model))


def linear_experts(model: Module) -> dict[str, Module]:
    """Name -> experts that it has made Linears of."""
    found = model.named_modules()
    return {name: one for name, one in found if isinstance(one, LINEAR_EXPERTS)}


def made_linear(experts: Module, config: PretrainedConfig) -> Module:
    """Linears of experts in one tensor, in its dtype."""
    config = copy.copy(config)
    # after `save_pretrained` the model's is a string, of which torch makes no Linear
    config.dtype = next(experts.parameters()).dtype
    kind = LinearExperts2D.get_linear_experts_cls(type(experts))
    return kind.from_experts_module(experts, config)
