"""What `absorb check` found."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absorb_plugin.evaluation.zeros import Count

__all__ = [
    "CheckReport",
    "LinearZeros",
    "planned_share",
    "planned_zero_share",
    "zero_share",
]

# What takes each format (docs/deploy.md says what of this was tried).
RUNTIMES: dict[str | None, dict[str, str]] = {
    None: {
        "transformers": "yes",
        "vLLM, SGLang": "as a dense model: zeros make it neither faster nor smaller",
        "vLLM on a CPU": "yes",
    },
    "int-quantized": {
        "transformers": "yes",
        "vLLM, SGLang": "NVIDIA Turing to Hopper, not Blackwell",
        "vLLM on a CPU": "with VNNI instructions",
    },
    "pack-quantized": {
        "transformers": "yes",
        "vLLM, SGLang": "NVIDIA Turing or newer",
        "vLLM on a CPU": "with AVX-512, served in 16 bits",
    },
    "float-quantized": {
        "transformers": "yes",
        "vLLM, SGLang": "NVIDIA Ada or newer; older ones by weights alone",
        "vLLM on a CPU": "with AMX",
    },
}
DOUBTFUL = "perhaps not: see the warning"
UNTRIED = {"transformers": "not loaded here", "vLLM, SGLang": "not known to this check"}


@dataclass(frozen=True)
class LinearZeros:
    """
    :param block: name of its decoder block, or an empty string
    :param count: its zeros, after dequantisation
    :param columns: width of its input
    :param planned: share of zeros that recipe.yaml asks for; None if it asks for none
    """

    block: str
    count: Count
    columns: int
    planned: float | None


@dataclass
class CheckReport:
    """
    :param linears: name in the files -> zeros, in the model's order; the output head
        apart
    :param quantization: `method`, `format` and `bits`, or None
    :param loads: whether transformers loads it; None if that was not tried
    :param doubtful: whether transformers could not say which weights it would find
    :param problems: what is broken, with remedies
    :param warnings: what to know
    :param told: names of tensors that a problem says are not in the files
    """

    directory: Path
    model_type: str
    bytes: int
    files: int
    dtype: str
    tied: bool
    quantization: dict[str, Any] | None
    linears: dict[str, LinearZeros] = field(default_factory=dict)
    loads: bool | None = None
    doubtful: bool = False
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    def absent(self, problem: str, tensors: Iterable[str]) -> None:
        """
        A problem with what is not in the files.

        :param tensors: all that it is about, of which it names but one
        """
        self.problems.append(problem)
        self.told.update(tensors)

    @property
    def format(self) -> str | None:
        return self.quantization["format"] if self.quantization else None

    @property
    def other_method(self) -> str | None:
        """By which it is quantised, if that is not by compressed-tensors."""
        if self.quantization is None:
            return None
        method = self.quantization["method"]
        if method == "compressed-tensors" or (method is None and self.format):
            return None
        return str(method or "an unknown method")

    @property
    def zeros(self) -> float | None:
        """Share over all Linears but the head; None if they could not be counted."""
        return zero_share(list(self.linears.values()))

    @property
    def planned(self) -> float | None:
        """Share that the plan asks for, over the Linears that it names."""
        return planned_share(list(self.linears.values()))

    @property
    def planned_zeros(self) -> float | None:
        """Share over the Linears that the plan names."""
        return planned_zero_share(list(self.linears.values()))

    @property
    def ignored(self) -> int:
        """Linears that the plan does not name, where there is one."""
        named = sum(one.planned is not None for one in self.linears.values())
        return len(self.linears) - named if named else 0

    @property
    def runtimes(self) -> dict[str, str]:
        known = UNTRIED if self.other_method else RUNTIMES.get(self.format, UNTRIED)
        return known | {"transformers": DOUBTFUL} if self.doubtful else known

    @property
    def serve(self) -> str:
        narrow = self.format == "pack-quantized" and self.dtype == "float32"
        directory = shlex.quote(str(self.directory))
        return f"vllm serve {directory}" + " --dtype bfloat16" * narrow

    def blocks(self) -> dict[str, list[LinearZeros]]:
        """Decoder block -> its Linears."""
        found: dict[str, list[LinearZeros]] = {}
        for linear in self.linears.values():
            if linear.block:
                found.setdefault(linear.block, []).append(linear)
        return found

    def as_dict(self) -> dict[str, Any]:
        """What `absorb check --json` prints."""
        return {
            "directory": str(self.directory),
            "model_type": self.model_type,
            "bytes": self.bytes,
            "files": self.files,
            "dtype": self.dtype,
            "tied": self.tied,
            "quantization": self.quantization,
            "zeros": self.zeros,
            "planned": self.planned,
            "planned_zeros": self.planned_zeros,
            "blocks": [
                {
                    "name": name,
                    "parameters": sum(one.count.weights for one in linears),
                    "planned": planned_share(linears),
                    "planned_zeros": planned_zero_share(linears),
                    "zeros": zero_share(linears),
                }
                for name, linears in self.blocks().items()
            ],
            "linears": {
                name: {
                    "parameters": one.count.weights,
                    "planned": one.planned,
                    "zeros": one.count.share,
                }
                for name, one in self.linears.items()
            },
            "runtimes": self.runtimes,
            "serve": self.serve,
            "loads": self.loads,
            "problems": self.problems,
            "warnings": self.warnings,
        }


def zero_share(linears: Sequence[LinearZeros]) -> float | None:
    total = sum(one.count.weights for one in linears)
    return sum(one.count.zeros for one in linears) / total if total else None


def planned_zero_share(linears: Sequence[LinearZeros]) -> float | None:
    return zero_share([one for one in linears if one.planned is not None])


def planned_share(linears: Sequence[LinearZeros]) -> float | None:
    named = [(x.planned, x.count.weights) for x in linears if x.planned is not None]
    total = sum(weights for _, weights in named)
    return sum(share * weights for share, weights in named) / total if total else None
