"""What pruners make of weights, against llm-compressor's own functions."""

from itertools import chain

import pytest
import torch
from helpers.benchmarks import imported
from helpers.probes import PRUNERS
from helpers.upstream import as_upstream

from absorb_plugin.pruners import Pruner, SparseGPT, factor, sparsegpt
from absorb_plugin.pruners.factor import factored, factored_together

pytestmark = pytest.mark.contract
every_pruner = pytest.mark.parametrize("kind", list(PRUNERS))
# columns one by one, as on a CPU, and by patterns, as on an accelerator
both_walks = pytest.mark.parametrize("launches", [False, True])


@pytest.fixture
def walk(launches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "launches", lambda device: launches)


def inputs_with(features: int) -> torch.Tensor:
    mixing = torch.randn(features, features) / features**0.5
    inputs = torch.randn(4 * features, features) @ mixing
    inputs[:, 3] = 0  # a feature that is never there
    return inputs


def assert_as_upstream(
    pruner: Pruner,
    weights: list[torch.Tensor],
    inputs: torch.Tensor,
    sparsities: list[list[float]],
) -> None:
    before = [weight.clone() for weight in weights]
    # what is observed of parts of the tokens adds up
    observed = sum(pruner.observe(part) for part in inputs.split(50))
    found = pruner.prune(weights, observed, sparsities)
    for weight, wanted, pruned in zip(weights, sparsities, found, strict=True):
        for sparsity, one in zip(wanted, pruned, strict=True):
            expected = as_upstream(pruner)(weight, sparsity, inputs)
            assert torch.equal(one == 0, expected == 0)
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-3)
    assert all(map(torch.equal, weights, before))


@both_walks
@pytest.mark.usefixtures("walk")
@every_pruner
@pytest.mark.parametrize("features", [8, 128, 200])
@pytest.mark.parametrize(
    "sparsities", [[[0.7], [0.7]], [[0.0, 0.5], [0.3]], [[0.95], [0.3, 0.31, 0.9]]]
)
def test_weights_are_those_of_llm_compressor(
    kind: str, features: int, sparsities: list[list[float]]
) -> None:
    """Of several Linears with one input, at several sparsities at once."""
    torch.manual_seed(0)
    weights = [torch.randn(24, features), torch.randn(40, features)]
    assert_as_upstream(PRUNERS[kind](), weights, inputs_with(features), sparsities)


@both_walks
@pytest.mark.usefixtures("walk")
@pytest.mark.parametrize("block_size, dampening", [(16, 0.02), (1, 0.3), (1000, 0.01)])
def test_settings_of_sparsegpt(block_size: int, dampening: float) -> None:
    torch.manual_seed(0)
    pruner = SparseGPT(block_size, dampening)
    assert_as_upstream(pruner, [torch.randn(24, 40)], inputs_with(40), [[0.5, 0.8]])


@both_walks
@pytest.mark.usefixtures("walk")
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_zeros_that_are_kept(sparsity: float) -> None:
    """`preserve_sparsity_mask`: they stay zero and count, also in unequal columns."""
    torch.manual_seed(0)
    weights = [torch.randn(24, 200), torch.randn(40, 200)]
    for weight in weights:
        weight[torch.rand_like(weight) < 0.2] = 0
        weight[:20, 128:140] = 0  # more than its share
    pruner = SparseGPT(preserve=True)
    assert_as_upstream(pruner, weights, inputs_with(200), [[sparsity], [sparsity]])
    (pruned,), _ = pruner.prune(
        weights, pruner.observe(inputs_with(200)), [[sparsity], [sparsity]]
    )
    assert not pruned[weights[0] == 0].any()


@both_walks
@pytest.mark.usefixtures("walk")
@pytest.mark.parametrize("preserve", [False, True])
def test_sets_of_inputs_share_a_walk(preserve: bool) -> None:
    """Each is pruned as it is alone, at its own sparsities; one Hessian is singular."""
    torch.manual_seed(0)
    weights = [torch.randn(24, 200), torch.randn(40, 200)]
    weights[0][torch.rand_like(weights[0]) < 0.2] = 0
    pruner = SparseGPT(dampening=0.0, preserve=preserve)
    observed = [
        pruner.observe(inputs_with(200)),
        pruner.observe(torch.ones(2, 200)),
        pruner.observe(inputs_with(200)),
    ]
    wanted = [[[0.5, 0.7], [0.3, 0.9]], [[0.6, 0.5], [0.8, 0.2]], [[0.5, 0.4]] * 2]
    found = pruner.prune_each(weights, observed, wanted)
    for one, sparsities, together in zip(observed, wanted, found, strict=True):
        alone = pruner.prune(weights, one, sparsities)
        for own, other in zip(chain(*alone), chain(*together), strict=True):
            assert torch.equal(own == 0, other == 0)
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        first, second = (chain(*found[n]) for n in (0, 2))
        assert not all(map(torch.equal, first, second))


def test_too_few_tokens_and_no_dampening_are_survived() -> None:
    """The Hessian is singular: both fall back to magnitudes."""
    inputs, weight = torch.ones(2, 6), torch.randn(4, 6)
    pruner = SparseGPT(dampening=0.0)
    ((found,),) = pruner.prune([weight], pruner.observe(inputs), [[0.5]])
    torch.testing.assert_close(found, as_upstream(pruner)(weight, 0.5, inputs))
    assert int((found == 0).sum()) == 13


@every_pruner
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_are_kept(kind: str, dtype: torch.dtype) -> None:
    pruner, weight = PRUNERS[kind](), torch.randn(6, 8).to(dtype)
    observed = pruner.observe(torch.randn(32, 8).to(dtype))
    assert observed.dtype == torch.float32
    ((found,),) = pruner.prune([weight], observed, [[0.5]])
    assert found.dtype == dtype and found.isfinite().all()


@every_pruner
def test_masks_rank_for_one_linear_as_the_mask_pruner_prunes(kind: str) -> None:
    masks = PRUNERS[kind]().masks
    weight, inputs = torch.randn(12, 20), torch.randn(64, 20)
    observed = masks.observe(inputs)
    wanted = [0.0, 0.25, 0.5, 1.0]
    at = masks.thresholds(weight, observed, wanted).split(1, dim=1)
    masked = [masks.masked(weight, observed, column) for column in at]
    pruned = list(chain(*masks.prune([weight], observed, [wanted])))
    assert all(map(torch.equal, masked, pruned))
    assert [int((one == 0).sum()) for one in masked] == [0, 60, 120, 240]
    both = masks.masked_and_between(weight, observed, at[1], at[0], at[2])
    assert all(map(torch.equal, both, (masked[1], weight - masked[2])))
    _, none = masks.masked_and_between(weight, observed, at[1], at[2], at[2])
    assert not none.any()


@pytest.mark.parametrize("sets, columns, rows", [(1, 128, 9), (3, 20, 70), (2, 5, 3)])
def test_patterns_of_eight_columns_are_their_columns_one_by_one(
    sets: int, columns: int, rows: int
) -> None:
    torch.manual_seed(0)
    part = torch.randn(sets, columns, rows)
    inverse = torch.eye(columns) + torch.randn(sets, columns, columns).triu() / 3
    mask = torch.rand_like(part) < 0.6
    found = []
    for prune in (sparsegpt._one_by_one, sparsegpt._by_patterns):
        own, errors = part.clone(), torch.zeros_like(part)
        prune(own, mask, inverse, errors)
        found.append((own * ~mask, errors))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1][1] == 0, ~mask)


@pytest.mark.parametrize("panel", [7, 8, 24, 1000])
@pytest.mark.parametrize("singular", [False, True])
def test_a_factor_by_panels(
    panel: int, singular: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one rank; of several: tests/test_distributed.py."""
    monkeypatch.setattr(factor, "PANEL", panel)
    torch.manual_seed(0)
    inputs = torch.ones(2, 24) if singular else inputs_with(24)
    hessian, dampening = inputs.T @ inputs, 0.0 if singular else 0.01
    expected = factored(hessian, dampening)
    with imported("imagined_ranks") as script, script.imagined_ranks(1):
        found = factored_together(hessian.clone(), dampening)
    assert found is not None
    triangle = found.triangle.triu()
    torch.testing.assert_close(triangle, expected.triangle, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.unused, expected.unused)
    assert found.unused.tolist() == [not singular and i == 3 for i in range(24)]
    if singular:
        assert torch.equal(triangle, torch.eye(24))
        return
    dampened = hessian + torch.eye(24) * 0.01 * (hessian.trace() + 1) / 24
    dampened[3, 3] += 1
    torch.testing.assert_close(triangle @ triangle.T, dampened, rtol=1e-4, atol=1e-3)
