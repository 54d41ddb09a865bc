"""
Names to choose from, alike in recipes and on the command line, which needs them before
torch is imported. tests/test_names.py holds them against what they name.
"""

from typing import Literal

__all__ = ["EffortName", "Granularity", "Level", "NoiseDtype", "PrunerName"]
__all__ += ["Quantization", "SinkTokens"]

EffortName = Literal["quick", "standard", "thorough"]
Granularity = Literal["block", "linear"]
Level = Literal["auto", "block", "part", "linear"]
NoiseDtype = Literal["model", "float32"]
PrunerName = Literal["wanda", "sparsegpt"]
Quantization = Literal["w8a8", "w4a16", "fp8"]
SinkTokens = Literal["perturb", "spare", "auto"]
