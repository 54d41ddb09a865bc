"""
What the allocation costs on large models, worked out, not measured.

    python integration/benchmarks/cost_model.py [--gpus 1 8] [--samples 8] [--json]

Prints the tables of docs/scaling.md: for every station of the defaults the passes of a
block over a token, the floating-point operations, the bytes moved from host memory to
a GPU where the model is offloaded, and the memory beside the model. The formulas are
those of docs/scaling.md; memory comes from the package's own `Footprint`.
"""

import argparse
import json
import math
from dataclasses import dataclass
from unittest.mock import patch

import torch
from absorb_plugin.memory import Footprint, footprint
from transformers import LlamaConfig, LlamaForCausalLM

ELEMENT = 2  # bytes of a bfloat16
MEMORY = 4 * 2**30  # sweep_memory's default
ROUNDS = 4
CANDIDATES = 4  # strengths of a round
JOINED = 8  # samples that a sweep joins to a batch at most
CONFIGS = {
    "8B": dict(hidden=4096, inner=14336, layers=32, heads=32, kv=8, vocab=128256),
    "70B": dict(hidden=8192, inner=28672, layers=80, heads=64, kv=8, vocab=128256),
    "405B": dict(hidden=16384, inner=53248, layers=126, heads=128, kv=8, vocab=128256),
}


@dataclass(frozen=True)
class Size:
    """
    :param block: weights of one block's Linears
    :param head: weights of the output head
    :param groups: (in_features, out_features) of the Linears that share an input
    """

    layers: int
    block: int
    head: int
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, hidden, inner, layers, heads, kv, vocab) -> "Size":
        projections = int(hidden * (1 + 2 * kv / heads))
        groups = (
            (hidden, projections),
            (hidden, hidden),
            (hidden, 2 * inner),
            (inner, hidden),
        )
        return cls(layers, sum(i * o for i, o in groups), hidden * vocab, groups)

    def pruning(self, tokens: int) -> float:
        """
        FLOP of SparseGPT on all blocks: per input the Hessian of the tokens, its
        Cholesky factor and that factor's inverse, then each column's error taken up by
        the columns behind it.
        """
        return self.layers * sum(
            2.0 * tokens * i * i + (1 / 3 + 1) * i**3 + float(i) * i * o
            for i, o in self.groups
        )


@dataclass(frozen=True)
class Station:
    """
    One sweep.

    :param passes: block passes per token, over all blocks; a backward pass is two
    :param scored: trajectories that the output head turns into logits
    :param visits: how often a block is onloaded per batch
    """

    name: str
    samples: int
    tokens: int
    passes: float
    scored: int
    visits: int
    trajectories: int
    masked: bool = False
    differentiates: bool = False
    widens: bool = False
    compensates: bool = False
    undivided: bool = False


def stations(layers: int, samples: int, tokens: int, probe: int) -> list[Station]:
    """The stations of the defaults, each with all its rounds' runs counted once."""
    return [
        Station("statistics", 16, tokens, layers, 0, 1, 0),
        Station(
            "signal, a round", samples, probe, 4 * layers, 3, 2, layers + 2, True, True
        ),
        Station(
            "candidates, a round",
            samples,
            probe,
            CANDIDATES * layers,
            CANDIDATES,
            1,
            CANDIDATES - 1,
            True,
        ),
        # calibrates by as many samples again, and passes every block twice; the model's
        # own pass carries one of the two allocations
        Station(
            "rehearsal of base and outcome",
            2 * samples,
            probe,
            4 * layers,
            1,
            1,
            2,
            True,
            compensates=True,
            undivided=True,
        ),
        Station(
            "noise, for the report",
            1,
            probe,
            layers * (layers + 1) / 2 + layers - 1,
            0,
            1,
            layers + 2,
            widens=True,
        ),
        Station(
            "response instead of the signal",
            samples,
            probe,
            layers * (layers + 3) / 2,
            layers + 1,
            1,
            layers,
            True,
        ),
    ]


def memory_of(fields: dict, station: Station) -> Footprint:
    """The package's own figure, on a model without memory."""
    config = LlamaConfig(
        hidden_size=fields["hidden"],
        intermediate_size=fields["inner"],
        num_hidden_layers=1,
        num_attention_heads=fields["heads"],
        num_key_value_heads=fields["kv"],
        vocab_size=fields["vocab"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    # no float32 copies of weights: this is for a GPU
    with patch("absorb_plugin.memory.bfloat16_is_slow", return_value=False):
        return footprint(model, model.model.layers, [station], MEMORY)


def costs(fields: dict, station: Station, gpus: int) -> dict:
    size = Size.of(**fields)
    need = memory_of(fields, station)
    if station.undivided:  # one batch, on every GPU the same
        mine = together = station.samples
    else:
        mine = math.ceil(station.samples / gpus)
        together = min(JOINED, mine, need.samples(station.tokens, MEMORY))
    batches = math.ceil(mine / together)
    tokens = mine * station.tokens
    flops = 2.0 * tokens * (station.passes * size.block + station.scored * size.head)
    if station.compensates:
        flops += station.trajectories * size.pruning(tokens // 2)
    return {
        "station": station.name,
        "gpus": gpus,
        "tokens": tokens,
        "block_passes": station.passes,
        "batches": batches,
        "flops": flops,
        # the embedding is as large as the head
        "moved": ELEMENT
        * float(batches)
        * (
            station.visits * size.layers * size.block
            + (3 if station.scored else 1) * size.head
        ),
        "memory": need.fixed + together * need.sample(station.tokens),
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| model | GPUs | station | tokens a GPU | block passes a token | batches "
        "| PFLOP a GPU | GB moved to a GPU, offloaded | GiB beside the model |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['gpus']} | {row['station']} "
            f"| {row['tokens']:,} | {row['block_passes']:,.0f} | {row['batches']} | "
            f"{row['flops'] / 1e15:,.2f} | {row['moved'] / 1e9:,.0f} | "
            f"{row['memory'] / 2**30:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--samples", type=int, default=8, help="of signal and held-out")
    parser.add_argument("--seq-len", type=int, default=2048, help="for the statistics")
    parser.add_argument("--probe-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [
        {"model": name, **costs(fields, station, gpus)}
        for name, fields in CONFIGS.items()
        for gpus in options.gpus
        for station in stations(
            fields["layers"], options.samples, options.seq_len, options.probe_tokens
        )
    ]
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
