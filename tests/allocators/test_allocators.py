"""One contract for every registered allocator, then parity, one by one."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.offload import offload_module, set_onload_device
from compressed_tensors.offload.cache import OffloadCache
from helpers import tiny
from helpers.allocator_references import (
    importances,
    reference_alpha,
    reference_alpha_pruning,
    reference_atp,
    reference_dlp,
    reference_lsa,
    reference_owl,
    reference_reconstruction,
    reference_tail,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.allocators import (
    Allocator,
    AlphaPruning,
    Atp,
    Dlp,
    LinearGroup,
    LinearStatistics,
    Lsa,
    Owl,
    Uniform,
)
from absorb_plugin.allocators import alpha_pruning as tail
from absorb_plugin.allocators.alpha_pruning import fit_tail, spectrum, tail_exponent
from absorb_plugin.allocators.base_allocation import Base, Numbers, base_allocation
from absorb_plugin.allocators.dlp import median_importance
from absorb_plugin.allocators.lsa import reconstruction_error
from absorb_plugin.blocks import find_blocks
from absorb_plugin.evaluation.allocation import allocate_model
from absorb_plugin.plugins import allocators, build_allocator, run_allocator
from absorb_plugin.search.budget import Budget, meet_budget

ROOT = Path(__file__).parents[2]
NAMES = sorted(allocators())
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = {"attn.q": (24, 16), "attn.o": (16, 24), "mlp.up": (40, 16)}


def linear(weight: torch.Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def group(
    name: str,
    weights: dict[str, torch.Tensor],
    square_sums: dict[str, torch.Tensor],
) -> LinearGroup:
    statistics = {
        key: LinearStatistics(
            linear(weight),
            square_sums[key],
            # as if the features of an input were not correlated
            measured=Lsa().measure(weight, square_sums[key].diag()),
        )
        for key, weight in weights.items()
    }
    return LinearGroup(name, statistics, sum(w.numel() for w in weights.values()))


def model(
    sizes: Iterable[int] = (1, 1, 1, 1),
    dtype: torch.dtype = torch.float32,
    seeds: Iterable[int] | None = None,
) -> list[LinearGroup]:
    """Blocks of heavy-tailed weights; `sizes` multiplies the width of each block."""
    groups = []
    sizes = list(sizes)
    for index, (size, seed) in enumerate(
        zip(sizes, seeds or range(len(sizes)), strict=True)
    ):
        generator = torch.Generator().manual_seed(seed)
        weights, square_sums = {}, {}
        for key, (rows, columns) in SHAPES.items():
            shape = (rows * size, columns * size)
            weight = torch.randn(shape, generator=generator)
            weights[key] = (0.02 * weight * weight.abs() ** (seed % 3)).to(dtype)
            columns_norm = torch.rand(shape[1], generator=generator)
            square_sums[key] = 1e3 * columns_norm**4
        groups.append(group(f"layers.{index}", weights, square_sums))
    return groups


def pooled(one: LinearGroup) -> torch.Tensor:
    linears = list(one.linears.values())
    return importances([x.weight for x in linears], [square_sum(x) for x in linears])


def square_sum(statistics: LinearStatistics) -> torch.Tensor:
    assert statistics.input_square_sum is not None
    return statistics.input_square_sum


def per_linear(groups: list[LinearGroup]) -> list[LinearGroup]:
    return [
        LinearGroup(f"{one.name}.{key}", {key: x}, x.weight.numel())
        for one in groups
        for key, x in one.linears.items()
    ]


# --- the contract -----------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3, 2), (2,)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_length_bounds_and_budget(
    name: str, sizes: tuple[int, ...], sparsity: float
) -> None:
    groups = model(sizes)
    result = run_allocator(build_allocator(name, {}), groups, sparsity)
    assert result.metric.shape == result.sparsity.shape == (len(sizes),)
    assert np.isfinite(result.metric).all()
    assert ((result.sparsity >= 0) & (result.sparsity <= 1)).all()
    parameters = np.array([one.parameters for one in groups])
    final = meet_budget(result.sparsity, parameters, sparsity)
    assert abs(parameters @ final / parameters.sum() - sparsity) < 1e-6
    if len(sizes) == 1:
        assert result.sparsity[0] == pytest.approx(sparsity, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_same_input_same_answer(name: str) -> None:
    first, second = (
        run_allocator(build_allocator(name, {}), model((1, 2, 1)), 0.6)
        for _ in range(2)
    )
    assert np.array_equal(first.metric, second.metric)
    assert np.array_equal(first.sparsity, second.sparsity)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "atp"])
def test_equal_blocks_mean_exactly_uniform(name: str) -> None:
    groups = model((1, 1, 1), seeds=(5, 5, 5))
    result = run_allocator(build_allocator(name, {}), groups, 0.7)
    assert len(set(result.metric.tolist())) == 1
    assert result.sparsity.tolist() == [0.7] * 3


@pytest.mark.parametrize("name", [n for n in NAMES if n != "uniform"])
def test_different_blocks_do_not(name: str) -> None:
    result = run_allocator(build_allocator(name, {}), model(), 0.7)
    assert np.ptp(result.sparsity) > 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_weights_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """The same values stored wider give the same answer."""
    narrow = model((1, 2, 1), dtype)
    wide = [
        group(
            one.name,
            {key: x.weight.float() for key, x in one.linears.items()},
            {key: square_sum(x) for key, x in one.linears.items()},
        )
        for one in narrow
    ]
    allocator = build_allocator(name, {})
    first = run_allocator(allocator, narrow, 0.6)
    second = run_allocator(allocator, wide, 0.6)
    np.testing.assert_allclose(first.metric, second.metric, rtol=1e-6)
    np.testing.assert_allclose(first.sparsity, second.sparsity, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if "linear" in allocators()[n].allocator.granularities]
)
def test_linear_granularity(name: str) -> None:
    groups = per_linear(model((1, 2)))
    result = run_allocator(build_allocator(name, {}), groups, 0.6)
    assert result.sparsity.shape == (6,)
    assert np.ptp(result.metric) > 0


@pytest.mark.parametrize("name", NAMES)
def test_dead_weights_are_no_division_by_zero(name: str) -> None:
    shapes = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    sums = {key: torch.zeros(shape[1]) for key, shape in SHAPES.items()}
    dead = group("layers.9", shapes, sums)
    for groups in ([dead, dead], [*model(), dead]):
        run_allocator(build_allocator(name, {}), groups, 0.7)
    if name not in ("atp", "uniform"):
        result = run_allocator(build_allocator(name, {}), [dead, dead], 0.7)
        assert result.sparsity.tolist() == [0.7, 0.7]


@pytest.mark.parametrize("device", ["cpu", "disk"])
@pytest.mark.parametrize("name", NAMES)
def test_offloaded_weights(name: str, device: str, tmp_path: Path) -> None:
    """A weight comes back as a new tensor at every access; the answer is the same."""
    allocator = build_allocator(name, {})
    expected = run_allocator(allocator, model((1, 2)), 0.6)
    groups = model((1, 2))
    where = {"offload_dir": str(tmp_path)} if device == "disk" else {}
    for linear in (x for one in groups for x in one.linears.values()):
        offload_module(linear.module, "cpu", device, **where)
    result = run_allocator(allocator, groups, 0.6)
    assert np.array_equal(result.metric, expected.metric)
    assert np.array_equal(result.sparsity, expected.sparsity)
    assert result.linear_metrics == expected.linear_metrics


@pytest.mark.parametrize("name", NAMES)
def test_offloaded_model(name: str) -> None:
    """As above, with the statistics gathered from the offloaded model as well."""

    def allocate(offload: bool) -> Base:
        whole = tiny.make_model("llama", num_hidden_layers=2)
        if offload:
            set_onload_device(whole, "cpu")
            weight = whole.model.layers[0].mlp.up_proj._parameters
            assert isinstance(weight, OffloadCache)
        modifier = AbsorptionAllocationModifier(allocator=name, strength=0)
        return allocate_model(whole, tiny.make_dataset(2), 0.6, modifier).base

    resident, offloaded = allocate(False), allocate(True)
    assert np.array_equal(resident.metric, offloaded.metric)
    assert np.array_equal(resident.sparsity, offloaded.sparsity)
    assert resident.linear_metrics == offloaded.linear_metrics


@pytest.mark.parametrize("name", NAMES)
def test_every_allocator_says_where_it_comes_from(name: str) -> None:
    allocator = allocators()[name].allocator
    assert allocator.paper.startswith("https://")
    assert allocator.paper in (allocator.__doc__ or "")
    assert allocator.cost


@pytest.mark.parametrize(
    ("allocator", "arguments"),
    [
        (Owl, {"m": 0.0}),
        (Owl, {"lmbda": -0.1}),
        (Dlp, {"alpha": float("nan")}),
        (Dlp, {"reduce": "mode"}),
        (Lsa, {"fraction": 1.0}),
        (Lsa, {"group_size": 1}),
        (Atp, {"beta": -0.01}),
        (AlphaPruning, {"epsilon": 1.5}),
        (AlphaPruning, {"variant": "middle"}),
        (Uniform, {"anything": 1}),
    ],
)
def test_arguments_are_checked(allocator: type[Allocator], arguments: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(arguments))):
        allocator(**arguments)


# --- parity -----------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("m", [2.0, 5.0])
def test_owl_parity(sizes: tuple[int, ...], m: float) -> None:
    groups = model(sizes)
    metric, sparsity = reference_owl([pooled(g) for g in groups], 0.7, m, 0.08)
    result = Owl(m=m).allocate(groups, 0.7)
    np.testing.assert_allclose(result.metric, metric, rtol=1e-9)
    np.testing.assert_allclose(result.sparsity, sparsity, atol=1e-9)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3, 2)], ids=str)
def test_dlp_parity(sizes: tuple[int, ...]) -> None:
    groups = model(sizes)
    metric, sparsity = reference_dlp([pooled(g) for g in groups], 0.6, 0.15)
    result = Dlp().allocate(groups, 0.6)
    np.testing.assert_allclose(result.metric, metric, rtol=1e-6)
    np.testing.assert_allclose(result.sparsity, sparsity, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_dlp_median(count: int) -> None:
    groups = model((1, 3, 2, 1)[:count])
    metric, _ = reference_dlp([pooled(g) for g in groups], 0.6, 0.15, torch.median)
    result = Dlp(reduce="median").allocate(groups, 0.6)
    np.testing.assert_allclose(result.metric, metric, rtol=1e-6)
    assert not np.allclose(result.metric, Dlp().allocate(groups, 0.6).metric)


@given(st.lists(st.floats(0, 2.0**60, width=32), min_size=1, max_size=40))
def test_the_median_is_exact(values: list[float]) -> None:
    weights = {"all": torch.tensor([values, values[::-1]])}
    one = group("layers.0", weights, {"all": torch.ones(len(values))})
    assert median_importance(one) == sorted(values)[(len(values) - 1) // 2]


@pytest.mark.parametrize("group_size", [4, 6, 128])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.7])
def test_reconstruction_error_parity(fraction: float, group_size: int) -> None:
    torch.manual_seed(0)
    mixed = torch.randn(16, 16)
    inputs = torch.randn(50, 16) @ (mixed + 2)  # features that are correlated
    weight = torch.randn(5, 16)
    expected, kept = reference_reconstruction(weight, inputs, fraction, group_size)
    found = reconstruction_error(weight, inputs.T @ inputs, fraction, group_size)
    assert found == pytest.approx(expected, rel=1e-4)
    whole = torch.linalg.norm((weight - kept).double() @ inputs.double().T) ** 2
    assert found == pytest.approx(float(whole), rel=1e-4)


def test_greedy_removal_beats_the_smallest_scores() -> None:
    torch.manual_seed(1)
    inputs = torch.randn(200, 32) @ (torch.randn(32, 32) + 1)
    weight, gram = torch.randn(8, 32), inputs.T @ inputs
    scores = weight.abs() * gram.diagonal().sqrt()
    smallest = scores <= scores.kthvalue(16, dim=1, keepdim=True).values
    error = torch.linalg.norm((weight * smallest) @ inputs.T) ** 2
    assert reconstruction_error(weight, gram) < 0.7 * float(error)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3, 2)], ids=str)
def test_lsa_parity(sizes: tuple[int, ...]) -> None:
    groups = model(sizes)
    for granularity in (groups, per_linear(groups)):
        errors = [[x.measured for x in g.linears.values()] for g in granularity]
        parameters = [one.parameters for one in granularity]
        metric, sparsity = reference_lsa(errors, parameters, 0.7, 0.1)
        result = Lsa(beta=0.1).allocate(granularity, 0.7)
        np.testing.assert_allclose(result.metric, metric, rtol=1e-9)
        np.testing.assert_allclose(result.sparsity, sparsity, atol=1e-9)
        total = np.dot(result.sparsity, parameters) / sum(parameters)
        assert total == pytest.approx(0.7)  # without the budget step


def test_lsa_measures_what_enters_the_linears() -> None:
    """Errors of a whole allocation against hooks, an input and a loop."""
    whole = tiny.make_model("llama", num_hidden_layers=2)
    data = tiny.make_dataset(2)
    settings = AbsorptionAllocationModifier(allocator="lsa", strength=0)
    found = allocate_model(whole, data, 0.6, settings).base.linear_metrics
    inputs: dict[str, torch.Tensor] = {}
    for name, module in whole.named_modules():
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0]} if args else {})
        )
    with torch.no_grad():
        whole(**{key: torch.tensor(data[key]) for key in data.column_names})
    assert len(found) == 14
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        x, weight = inputs[name].flatten(0, 1), whole.get_submodule(name).weight
        expected, _ = reference_reconstruction(weight.detach(), x, 0.5, 128)
        assert found[name] == pytest.approx(expected / 2, rel=1e-3)  # of two samples


def test_an_allocator_without_its_statistics() -> None:
    bare = LinearGroup("layers.0", {"q": LinearStatistics(linear(torch.ones(2, 2)))}, 4)
    for allocator, what in ((Lsa(), "reconstruction errors"), (Owl(), "inputs")):
        with pytest.raises(ValueError, match=what):
            allocator.allocate([bare], 0.5)


def test_atp_parity() -> None:
    result = Atp(beta=0.01).allocate(model(), 0.6)
    np.testing.assert_allclose(result.sparsity, reference_atp(4, 0.6, 0.01))


def test_atp_too_steep_is_clipped() -> None:
    result = Atp(beta=0.5).allocate(model(), 0.6)
    np.testing.assert_allclose(result.sparsity, [0.0, 0.35, 0.85, 1.0])


@pytest.mark.parametrize("variant", ["peak", "mid"])
def test_alpha_pruning_parity(variant: Any) -> None:
    groups = model((1, 3, 2))
    result = AlphaPruning(variant=variant).allocate(groups, 0.5)
    alphas = [
        {key: reference_alpha(x.weight, variant) for key, x in one.linears.items()}
        for one in groups
    ]
    for mine, theirs in zip(result.linear_metrics, alphas, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    means = [sum(x.values()) / len(x) for x in alphas]
    expected = reference_alpha_pruning(
        means, [one.parameters for one in groups], 0.5, 0.3
    )
    np.testing.assert_allclose(result.metric, means, atol=1e-3)
    np.testing.assert_allclose(result.sparsity, expected, atol=1e-3)


def test_alpha_pruning_clips_what_the_authors_do_not() -> None:
    groups = model((1, 3, 2))
    metric = AlphaPruning().allocate(groups, 0.9).metric.tolist()
    theirs = reference_alpha_pruning(metric, [x.parameters for x in groups], 0.9, 0.3)
    assert max(theirs) > 1
    result = AlphaPruning().allocate(groups, 0.9)
    np.testing.assert_allclose(result.sparsity, np.clip(theirs, 0, 1))


TWO_RANKS = """
import json, sys
import torch
from torch import distributed
from absorb_plugin.allocators import AlphaPruning, LinearGroup, LinearStatistics
from absorb_plugin.allocators import alpha_pruning as tail

torch.set_num_threads(1)
folder = sys.argv[1]
modules = torch.load(f"{folder}/modules.pt", weights_only=False)
names = {linear.weight.data_ptr(): name for name, linear in modules.items()}
computed = []


def counting(weight, variant):
    computed.append(names[weight.data_ptr()])
    return tail_exponent(weight, variant)


tail_exponent, tail.tail_exponent = tail.tail_exponent, counting


def rank(number):
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, rank=number, world_size=2)
    groups = {}
    for name, linear in modules.items():
        block, _, inner = name.partition("/")
        groups.setdefault(block, {})[inner] = LinearStatistics(linear)
    result = AlphaPruning().allocate(
        [
            LinearGroup(name, group, sum(x.weight.numel() for x in group.values()))
            for name, group in groups.items()
        ],
        0.6,
    )
    found = [computed, list(result.linear_metrics), result.sparsity.tolist()]
    with open(f"{folder}/rank{number}.json", "w") as file:
        json.dump(found, file)
    distributed.destroy_process_group()


# forked, so that one import serves both
torch.multiprocessing.start_processes(rank, nprocs=2, start_method="fork")
"""


def test_alpha_pruning_shares_the_linears_among_ranks(tmp_path: Path) -> None:
    groups = model((1, 3, 2))
    modules = {
        f"{one.name}/{name}": linear.module
        for one in groups
        for name, linear in one.linears.items()
    }
    torch.save(modules, tmp_path / "modules.pt")
    done = subprocess.run(
        [sys.executable, "-c", TWO_RANKS, str(tmp_path)],
        env=dict(os.environ, PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="lo"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{i}.json").read_text()) for i in (0, 1)]
    (first, *result), (second, *other) = ranks
    assert result == other
    assert first and second
    assert sorted(first + second) == sorted(modules)
    alone = AlphaPruning().allocate(groups, 0.6)
    alphas, sparsity = result
    for mine, theirs in zip(alphas, alone.linear_metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)
    np.testing.assert_allclose(sparsity, alone.sparsity, rtol=1e-9)


class LiveBytes(TorchDispatchMode):
    """The most bytes of freshly computed tensors that were alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self._made.append(weakref.ref(out))
            self._made = [ref for ref in self._made if ref() is not None]
            alive = [tensor for ref in self._made if (tensor := ref()) is not None]
            # what works in place returns the same memory again
            memory = {x.untyped_storage().data_ptr(): x.nbytes for x in alive}
            self.peak = max(self.peak, sum(memory.values()))
        return out


@pytest.mark.parametrize(
    ("name", "arguments", "most"),
    [
        # |W|·√a of one Linear, and one byte each for what is above the threshold
        ("owl", {}, 1.5),
        ("dlp", {}, 1.5),
        # and its bits, shifted, compared, and some of them picked
        ("dlp", {"reduce": "median"}, 4),
    ],
)
def test_never_more_than_one_linear_is_held(
    name: str, arguments: dict, most: float
) -> None:
    weights = {f"mlp.{i}": torch.randn(512, 512) for i in range(6)}
    groups = [group("layers.0", weights, dict.fromkeys(weights, torch.rand(512)))] * 2
    with LiveBytes() as live:
        build_allocator(name, arguments).allocate(groups, 0.5)
    one = 512 * 512 * 4
    assert one <= live.peak < most * one


# --- the spectrum and its tail ------------------------------------------------------


def matrix(kind: str, n: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(n, n, generator=generator)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2)
    )
    uniform = torch.rand(n, generator=generator)
    return {
        "gauss": 0.02 * noise,
        "tall": 0.02 * torch.cat([noise, noise.flip(0), noise.T]),
        "wide": torch.cat([noise, noise.T**3], dim=1),
        "heavy": noise * noise.abs() ** 2,
        "power law": (left * uniform**-0.5) @ right,
        "low rank and noise": noise[:, :6] @ noise[:6] + 0.01 * right,
        "decay": (left * torch.logspace(0, -3, n)) @ right,
        "huge": 1e18 * noise,
        "minute": 1e-18 * noise,
        "bfloat16": noise.bfloat16(),
    }[kind]


KINDS = [
    "gauss",
    "tall",
    "wide",
    "heavy",
    "power law",
    "low rank and noise",
    "decay",
    "huge",
    "minute",
    "bfloat16",
]


@pytest.mark.parametrize("variant", ["peak", "mid"])
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_is_that_of_float32_svdvals(kind: str, variant: Any) -> None:
    weight = matrix(kind)
    scale = float(weight.float().abs().max()) if kind in ("huge", "minute") else 1.0
    # float32 cannot hold the squares; where log10(e) is compared with e the scale of
    # the eigenvalues matters, so the reference gets them in float64
    singular = torch.linalg.svdvals(weight.float() / scale).double() * scale
    expected = reference_tail(singular.square().sort().values.tolist(), variant)
    assert tail_exponent(weight, variant) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("variant", ["peak", "mid"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_route_is_right_wherever_it_is_certain(
    kind: str, variant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = matrix(kind)
    expected = tail_exponent(weight, variant)
    monkeypatch.setattr(tail, "SMALL", 1)
    assert tail_exponent(weight, variant) == pytest.approx(expected, abs=1e-3)


def test_float32_route_is_taken_for_random_matrices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tail, "SMALL", 1)
    monkeypatch.setattr(tail, "spectrum", None)  # the float64 route would fail
    for seed in range(3):
        torch.manual_seed(seed)
        square, tall = torch.randn(256, 256), torch.randn(384, 128)
        for weight in (square, tall):
            expected = reference_alpha(weight)
            assert tail_exponent(weight) == pytest.approx(expected, abs=1e-3)


def test_float32_route_refines_the_smallest_eigenvalue() -> None:
    torch.manual_seed(1)
    weight = torch.randn(512, 512)
    weight = weight / weight.abs().max()
    rough = torch.linalg.eigvalsh(weight.T @ weight)[0]
    exact = float(spectrum(weight)[0])
    refined = tail._spectrum_float32(weight)
    assert refined is not None
    assert float(refined[0]) == pytest.approx(exact, rel=1e-5)
    assert float(rough) != pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("variant", ["peak", "mid"])
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(8, 8),
        torch.ones(8, 8),
        torch.randn(1, 8),
        torch.randn(8, 1),
        torch.eye(8),
    ],
    ids=["zero", "rank one", "one row", "one column", "equal eigenvalues"],
)
def test_nothing_to_fit_is_nan(weight: torch.Tensor, variant: Any) -> None:
    assert np.isnan(tail_exponent(weight, variant))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    weight = torch.randn(8, 8)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        tail_exponent(weight)


def test_a_linear_without_a_tail_takes_the_mean_of_its_block() -> None:
    torch.manual_seed(0)
    alive = {"a": torch.randn(16, 16), "b": torch.randn(16, 16) ** 3}
    sums = dict.fromkeys([*alive, "c"], torch.ones(16))
    with_dead = group("x", {**alive, "c": torch.zeros(16, 16)}, sums)
    without = group("y", alive, sums)
    result = AlphaPruning().allocate([with_dead, without], 0.5)
    assert result.metric[0] == result.metric[1]
    assert result.linear_metrics[0]["c"] == result.metric[0]


@pytest.mark.parametrize("variant", ["peak", "mid"])
def test_rank_deficient_is_fitted_on_what_there_is(variant: Any) -> None:
    torch.manual_seed(0)
    factors = torch.randn(40, 12), torch.randn(12, 40)
    weight = factors[0] @ factors[1]
    assert spectrum(weight).shape == (12,)
    singular = torch.linalg.svdvals(weight)[:12].double()
    expected = reference_tail(singular.square().sort().values.tolist(), variant)
    assert tail_exponent(weight, variant) == pytest.approx(expected, abs=1e-3)
    padded = torch.cat([weight, torch.zeros(9, 40)])
    assert tail_exponent(padded, variant) == pytest.approx(expected, abs=1e-3)


def test_two_eigenvalues_are_enough() -> None:
    fit = fit_tail(torch.tensor([1.0, np.e]).double())
    assert fit.alpha == pytest.approx(3.0)
    assert fit.start == pytest.approx(1.0)


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=60, unique=True),
    st.sampled_from(["peak", "mid"]),
)
@settings(max_examples=60, deadline=None)
def test_any_spectrum_gives_a_finite_exponent(values: list[float], how: Any) -> None:
    e = torch.tensor(sorted(values), dtype=torch.float64)
    fit = fit_tail(e, how)
    assert np.isnan(fit.alpha) or fit.alpha > 1


@given(
    alpha=st.floats(1.5, 6.0),
    start=st.floats(1e-3, 1e3),
    count=st.sampled_from([200, 1000]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_power_law_samples_give_back_their_exponent(
    alpha: float, start: float, count: int, seed: int
) -> None:
    """
    Hill's estimator over n values is off by (α−1)/√n (one sigma); "mid" fits the upper
    half, itself a power law of the same α.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    e = (start * (1 - uniform) ** (-1 / (alpha - 1))).sort().values
    sigma = (alpha - 1) / (count / 2) ** 0.5
    assert abs(fit_tail(e, "mid").alpha - alpha) < 5 * sigma


@given(alpha=st.floats(1.5, 6.0), count=st.sampled_from([120, 300]))
@settings(max_examples=20, deadline=None)
def test_exact_quantiles_of_a_power_law_give_back_its_exponent(
    alpha: float, count: int
) -> None:
    """Without sampling error "peak" is off by the discretisation alone, O(ln n/n)."""
    levels = torch.arange(count, dtype=torch.float64) / count
    e = (1 - levels) ** (-1 / (alpha - 1))
    bias = (alpha - 1) * np.log(count) / count
    assert abs(fit_tail(e, "peak").alpha - alpha) < 2 * bias


@given(seed=st.integers(0, 2**16), heavy=st.booleans(), count=st.integers(5, 60))
@settings(max_examples=30, deadline=None)
def test_vectorised_fit_is_the_loop(seed: int, heavy: bool, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(count, generator=generator, dtype=torch.float64).mul(2).exp()
    e = (e**2 if heavy else e).sort().values
    expected = reference_tail(e.tolist())
    if np.isfinite(expected):
        assert fit_tail(e).alpha == pytest.approx(expected, abs=1e-6)


def test_chunks_do_not_change_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    e = spectrum(matrix("gauss"))
    whole = fit_tail(e)
    monkeypatch.setattr(tail, "CHUNK", 200)
    assert fit_tail(e) == whole


def test_what_takes_long_is_computed_once_for_all_budgets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed: list[float] = []

    def counted(*arguments: Any) -> float:
        computed.append(tail_exponent(*arguments))
        return computed[-1]

    monkeypatch.setattr(tail, "tail_exponent", counted)
    blocks = find_blocks(tiny.make_model("llama"))
    sizes, numbers = np.ones(len(blocks.linears())), Numbers()
    for sparsity in (0.3, 0.5):
        budget = Budget.of(sizes, sparsity, 0.9)
        found = base_allocation(AlphaPruning(), blocks, {}, budget, cache=numbers)
        assert found.sparsity.mean() == pytest.approx(sparsity)
    assert len(computed) == len(sizes)
