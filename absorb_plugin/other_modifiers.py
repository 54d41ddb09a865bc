"""
What modifiers of llm-compressor other than pruners do to pruned weights. By name: their
modules moved between the versions that we support, and importing them takes seconds.
"""

__all__ = ["DESTROYS_ZEROS", "REMOVES_LINEARS", "ROTATE", "WORKED_OUT", "quantizes"]

# What they do to a weight that was pruned, measured in tests/test_quantization.py.
DESTROYS_ZEROS = {
    "AutoRoundModifier": "learns an offset for every weight, pruned ones included",
    "GPTQModifier": "moves the error of quantisation onto weights that were pruned",
    "QuIPModifier": "rotates the weights, which mixes zeros with other weights",
    "SpinQuantModifier": "rotates the weights, which mixes zeros with other weights",
}

# What an allocation made before them does not know of.
ROTATE = ("QuIPModifier", "SpinQuantModifier")

# They take Linears out of the model while the recipe runs.
REMOVES_LINEARS = ("REAPPruningModifier",)

# Two fields that a modifier fills in together. The second is in recipe.yaml, and with
# that the first is not worked out again when it is replayed, which fails.
WORKED_OUT = {"SpinQuantModifier": ("mappings", "transform_config")}


def quantizes(modifier: object) -> bool:
    """Whether it is one of those that quantise, whatever of the model."""
    return hasattr(modifier, "resolve_quantization_config")
