"""Measurements kept on disk: the same bits, never a wrong one, never half a file."""

import importlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors import offload
from helpers import probes, runs, tiny
from helpers.plugins import registered
from llmcompressor.core import reset_session
from llmcompressor.modeling.moe.context import moe_calibration_context
from transformers import PreTrainedModel

from absorb_plugin import fingerprint
from absorb_plugin.allocate import Allocation
from absorb_plugin.cache import ProfileCache, pack, unpack
from absorb_plugin.fingerprint import digest, model_digest, weights_digest
from absorb_plugin.forward.probe import Probe
from absorb_plugin.forward.run import run_probes

PACKAGE = Path(fingerprint.__file__).parent
KINDS = {
    "input_statistics",
    "noise_probe",
    "held_out_loss",
    "loss_slope",
    "pruning_as_wanda_does",
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is really measured, and not found in the cache."""
    seen: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> None:
        seen.append(kwargs["description"])
        run_probes(*args, **kwargs)

    monkeypatch.setattr("absorb_plugin.forward.runner.run_probes", counted)
    return seen


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one run; copy it."""
    folder = tmp_path_factory.mktemp("filled")
    allocate(folder)
    return folder


def allocate(
    cache: Path | None,
    sparsity: float = 0.5,
    model: PreTrainedModel | None = None,
    seed: int = 0,
    **fields: Any,
) -> Allocation:
    return runs.allocate(
        tiny.small() if model is None else model,
        [tiny.make_batch(6, seed=seed, padding="right")],
        sparsity,
        # what is free on a busy machine may be another next time
        **{"strength": "auto", "report_dir": "unused", "rounds": 2}
        | {"probe_memory": 2**30, **fields},
        profile_cache=cache,
    )


def assert_equal(one: Allocation, other: Allocation) -> None:
    """Bit by bit, all that was measured."""
    for allocation in (one, other):
        assert allocation.noise is not None and allocation.search is not None
    assert digest(one.linear_sparsities()) == digest(other.linear_sparsities())
    assert digest(vars(one.base)) == digest(vars(other.base))
    assert digest(vars(one.noise)) == digest(vars(other.noise))
    assert digest(one.confirmed) == digest(other.confirmed)
    assert digest(one.search) == digest(other.search)


@pytest.mark.parametrize("kind", list(probes.PRUNERS))
@pytest.mark.parametrize("signal", list(probes.SIGNALS))
def test_a_second_run_measures_nothing_and_finds_the_same(
    tmp_path: Path,
    measured: list[str],
    monkeypatch: pytest.MonkeyPatch,
    signal: str,
    kind: str,
) -> None:
    # whatever is found is taken, so that there is something to confirm
    monkeypatch.setattr("absorb_plugin.search.line_search.gain", lambda *_: (1.0, 0.0))
    without = allocate(None, signal=signal, kind=kind)
    first = allocate(tmp_path, signal=signal, kind=kind)
    assert f"Pruning as {kind} does" in measured
    measured.clear()
    second = allocate(tmp_path, signal=signal, kind=kind)
    # the pruned model is not kept: three times the size of the model itself
    assert set(measured) <= (
        {f"Pruning as {kind} does"} if signal == "pruner" else set()
    )
    assert_equal(without, first)
    assert_equal(first, second)


def test_a_probe_that_goes_on_until_it_knows(
    tmp_path: Path, measured: list[str]
) -> None:
    """One probe, several runs: each is found again."""
    fields = {"signal": "noise", "signal_args": {"samples": 1}, "strength": 0.1}
    first = allocate(tmp_path, **fields)
    assert measured.count("Noise probe") > 1
    measured.clear()
    second = allocate(tmp_path, **fields)
    assert not measured
    assert first.noise is not None and second.noise is not None
    assert digest(vars(first.noise)) == digest(vars(second.noise))


def test_another_sparsity_skips_statistics_and_probe(
    tmp_path: Path, measured: list[str]
) -> None:
    allocate(tmp_path, 0.5)
    measured.clear()
    kept = allocate(tmp_path, 0.6)
    dearest = {"Held-out loss", "Loss slope"}
    assert dearest <= set(measured) <= dearest | {"Pruning as wanda does"}
    assert_equal(kept, allocate(None, 0.6))


def test_another_pruner_skips_what_masks_tell(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # no search begins anew
    monkeypatch.setattr("absorb_plugin.search.confirm.CLEARLY", np.inf)
    allocate(tmp_path, kind="wanda")
    measured.clear()
    kept = allocate(tmp_path, kind="sparsegpt", signal="pruner")
    # of two rounds by masks none, and of one by its own weights that
    assert set(measured) == {"Loss slope", "Pruning as sparsegpt does"}
    assert measured.count("Loss slope") == 1
    assert_equal(kept, allocate(None, kind="sparsegpt", signal="pruner"))


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    whole = allocate(None)
    done: list[str] = []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if len(done) % 3 == 2:
            done.append("interrupted")
            raise KeyboardInterrupt
        run_probes(*args, **kwargs)
        done.append(kwargs["description"])

    monkeypatch.setattr("absorb_plugin.forward.runner.run_probes", interrupted)
    attempts = 0
    while True:
        attempts += 1
        try:
            resumed = allocate(tmp_path)
            break
        except KeyboardInterrupt:
            assert attempts < 10
    assert attempts > 1
    assert_equal(resumed, whole)
    assert [what for what in done if what != "interrupted"] == measured


def test_through_oneshot_the_weights_are_the_same(tmp_path: Path) -> None:
    """SparseGPT draws on the random state: a hit must leave it as a run does."""
    states = []
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        model = tiny.small()
        ours = runs.absorption(strength="auto", rounds=1, profile_cache=cache)
        runs.run(model, [ours, runs.pruner("sparsegpt")], tmp_path, batch_size=2)
        states.append(tiny.snapshot(model))
        reset_session()
    tiny.assert_same(states[0], states[1])
    tiny.assert_same(states[0], states[2])


CHANGES: dict[str, dict[str, Any]] = {
    "samples": {"seed": 1},
    "other samples held out": {"statistics_samples": 2},
    "memory": {"probe_memory": 4096},
    "noise seed": {"signal": "noise", "signal_args": {"seed": 1}},
    "noise magnitude": {"signal": "noise", "signal_args": {"magnitude": 0.1}},
    "sinks": {"signal": "noise", "signal_args": {"sink_tokens": "perturb"}},
    "dtype": {"signal": "noise", "signal_args": {"dtype": "float32"}},
    "step": {"signal_args": {"step": 0.2}},
    "level": {"signal": "response", "level": "linear"},
    "pruner": {"kind": "sparsegpt"},
    "probe tokens": {"probe_tokens": 5},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_measurement_depends_on_is_in_its_key(
    tmp_path: Path, filled: Path, change: str
) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    assert_equal(
        allocate(tmp_path, **CHANGES[change]), allocate(None, **CHANGES[change])
    )


def test_how_the_model_runs_is_in_the_key(tmp_path: Path) -> None:
    model = tiny.make_model("qwen3_moe")
    digests = {model_digest(model)}
    with moe_calibration_context():
        digests.add(model_digest(model))
    model.set_attn_implementation("sdpa")
    digests.add(model_digest(model))
    assert len(digests) == 3


def nudged() -> PreTrainedModel:
    """One weight by one unit in the last place, in the last Linear."""
    model = tiny.small()
    weight = model.model.layers[1].mlp.down_proj.weight.data
    weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(torch.inf))
    return model


def configured() -> PreTrainedModel:
    model = tiny.small()
    model.config.rms_norm_eps = 1e-3
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-3
    return model


@pytest.mark.parametrize("other", [nudged, configured])
def test_another_model_is_measured_anew(
    tmp_path: Path,
    measured: list[str],
    logs: list[str],
    other: Callable[[], PreTrainedModel],
) -> None:
    allocate(tmp_path)
    measured.clear()
    found = allocate(tmp_path, model=other())
    assert set(measured) >= {"Input statistics", "Held-out loss"}
    assert_equal(found, allocate(None, model=other()))
    assert any("of another model (weights, configuration" in line for line in logs)


def test_the_models_path_does_not_matter(tmp_path: Path) -> None:
    one, other = tiny.small(), tiny.small()
    other.config._name_or_path = "/somewhere/else"
    assert model_digest(one) == model_digest(other)


@pytest.mark.parametrize(
    "path, another",
    [
        ("cli/app.py", False),
        ("evaluation/perplexity.py", False),
        ("report/page.py", False),
        ("search/line_search.py", False),
        ("allocate.py", False),
        ("method.py", False),
        ("choices.py", False),
        ("modifier.py", False),
        ("settings.py", False),
        ("__init__.py", False),
        ("allocators/alpha_pruning.py", True),
        ("blocks.py", True),
        ("calibration.py", True),
        ("cpu.py", True),
        ("distributed.py", True),
        ("forward/run.py", True),
        ("groups.py", True),
        ("judges/pruned_loss.py", True),
        ("pruners/thresholds.py", True),
        ("signals/noise.py", True),
    ],
)
def test_only_code_that_measures_makes_another_key(
    monkeypatch: pytest.MonkeyPatch, path: str, another: bool
) -> None:
    before = model_digest(tiny.small())
    read, changed = Path.read_bytes, PACKAGE / path
    assert changed.is_file()

    def commented(self: Path) -> bytes:
        return read(self) + b"# a comment\n" * (self == changed)

    monkeypatch.setattr(Path, "read_bytes", commented)
    assert (model_digest(tiny.small()) != before) == another


def test_what_is_left_out_of_the_key_is_there() -> None:
    missing = {x for x in fingerprint.NOT_MEASURING if not (PACKAGE / x).exists()}
    assert not missing


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """One bit of the last tensor, or of the metadata where there is none."""
    content = bytearray(path.read_bytes())
    at = len(content) - 2
    if content.endswith(b" ") or content.endswith(b"}"):
        at = content.index(b"0x1.") + 5
    content[at] ^= 1
    path.write_bytes(bytes(content))


def pickled(path: Path) -> None:
    torch.save({"tree": [1]}, path)


def of_another_model(path: Path) -> None:
    """A whole, valid entry under a wrong name."""
    folder = path.parent / "other"
    allocate(folder, model=nudged())
    kind = path.name.split("-")[0]
    next(folder.glob(f"{kind}-*")).replace(path)


def of_another_format(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(b'"format":"1"') == 1
    path.write_bytes(content.replace(b'"format":"1"', b'"format":"9"'))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "cannot be read"),
    (empty, "cannot be read"),
    (flip, "does not fit its checksum"),
    (pickled, "cannot be read"),
    (of_another_model, "measured with another model"),
    (of_another_format, "has format '9'"),
]


@pytest.mark.parametrize(
    "kind, damage, reason",
    [
        *[("loss_slope", *damage) for damage in DAMAGES],
        # floats in JSON there, tensors here
        ("input_statistics", flip, "does not fit its checksum"),
        ("noise_probe", flip, "does not fit its checksum"),
    ],
)
def test_a_damaged_or_wrong_entry_is_named_and_never_used(
    tmp_path: Path,
    logs: list[str],
    measured: list[str],
    kind: str,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    whole = allocate(tmp_path)
    path = sorted(tmp_path.glob(f"{kind}-*.safetensors"))[0]
    damage(path)
    logs.clear()
    measured.clear()
    assert_equal(allocate(tmp_path), whole)
    assert len(measured) == 1
    (warning,) = [line for line in logs if line.startswith("WARNING")]
    assert str(path) in warning and reason in warning and "Measuring again" in warning
    logs.clear()
    allocate(tmp_path)  # the damaged one has been replaced
    assert not any(line.startswith("WARNING") for line in logs)


def test_every_kind_of_entry_and_no_temporary_file(tmp_path: Path) -> None:
    allocate(tmp_path)
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == KINDS
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_alpha_is_kept_per_linear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import absorb_plugin.allocators.alpha_pruning as alpha

    computed: list[tuple[int, ...]] = []
    original = alpha.tail_exponent

    def spied(weight: torch.Tensor, variant: Any = "peak") -> float:
        computed.append(tuple(weight.shape))
        return original(weight, variant)

    monkeypatch.setattr(alpha, "tail_exponent", spied)
    fields = {"allocator": "alpha_pruning", "strength": 0}
    first = allocate(tmp_path, 0.5, **fields)
    assert len(computed) == 14
    second = allocate(tmp_path, 0.6, **fields, allocator_args={"epsilon": 0.1})
    assert len(computed) == 14
    np.testing.assert_array_equal(first.base.metric, second.base.metric)
    allocate(tmp_path, 0.5, **fields, allocator_args={"variant": "mid"})
    assert len(computed) == 28
    again = allocate(None, 0.5, **fields)
    assert digest(again.linear_sparsities()) == digest(first.linear_sparsities())


def not_to_be_run() -> None:
    raise AssertionError("this should have been found in the cache")


# A pruned model is three times the size of the model itself, a check takes no time.
NOT_KEPT = {"chain check", "part check", "calls of Linears"} | {
    f"model pruned by {pruner}" for pruner in probes.PRUNERS
}
KEPT = [name for name in probes.PROBES if name not in NOT_KEPT]


def test_what_is_kept() -> None:
    batch, model = tiny.make_batch(padding="left"), tiny.small()
    where = probes.place(model, batch)
    kept = [name for name, case in probes.PROBES.items() if case.make(where).state]
    assert kept == KEPT


@pytest.mark.parametrize("name", KEPT)
def test_every_probe_comes_back_bit_by_bit(tmp_path: Path, name: str) -> None:
    model, batch = tiny.small(), tiny.make_batch(4, padding="left")
    where = probes.place(model, batch)
    cache = ProfileCache(str(tmp_path), model)
    first, second = (probes.PROBES[name].make(where) for _ in range(2))
    cache.load_or_run("x", [batch], first, 1, lambda: probes.run(model, [batch], first))
    cache.load_or_run("x", [batch], second, 1, not_to_be_run)
    assert digest(first.result()) == digest(second.result())


def test_a_probe_that_names_nothing_to_keep_is_refused(tmp_path: Path) -> None:
    class Forgetful(Probe):
        pass

    cache = ProfileCache(str(tmp_path), tiny.small())
    with pytest.raises(TypeError, match="Forgetful.state names nothing"):
        cache.load_or_run("x", [], Forgetful(), 1, not_to_be_run)


def test_values_come_back_as_they_were() -> None:
    values = {
        "nested": [[1.5, math.inf], [-0.0, 1e-320], []],
        "array": np.array([[np.nan, 1.0]]),
        "tensors": {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor(3)},
        "set": {(1, 2), (0, 5)},
        "plain": [None, True, 3, "text", ("a", 1)],
    }
    tensors: dict[str, torch.Tensor] = {}
    back = unpack(pack(values, tensors), tensors)
    assert digest(back) == digest(values)
    assert math.isnan(unpack(pack(math.nan, {}), {}))
    with pytest.raises(TypeError, match="cannot keep a Linear"):
        pack([torch.nn.Linear(1, 1)], {})


def test_digests_tell_values_apart() -> None:
    values = [
        None, 0, False, 0.0, -0.0, "0", [], [0], [[0]], {}, {"a": 0}, ["ab", "c"],
        ["a", "bc"], torch.zeros(2), torch.zeros(1, 2), torch.zeros(2).double(),
        np.zeros(2), np.zeros((2, 1)), (0,), {0}, torch.zeros(2, dtype=torch.bfloat16),
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    with pytest.raises(TypeError, match="what makes two Linear equal"):
        digest({"a": torch.nn.Linear(1, 1)})
    sets = [frozenset("abc"), frozenset("def"), frozenset("ghi")]
    code = f"from absorb_plugin.fingerprint import digest; print(digest({set(sets)}))"
    seeds = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        for seed in ("1", "2")
    ]
    assert seeds[0] == seeds[1] == digest(set(sets))


class Adapter(torch.nn.Module):
    """As those of peft: what it computes hangs on plain attributes."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.scaling = {"default": 2.0}
        self._disable_adapters = False
        self.active_adapter = ["default"]
        self.notes = object()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scaling", {"default": 3.0}),
        ("_disable_adapters", True),
        ("active_adapter", []),
        ("new", 1),
        ("scaling", {"default": np.float64(3.0), "other": object()}),
        ("scaling", torch.tensor(3.0)),
    ],
)
def test_numbers_of_an_adapter_are_part_of_the_model(name: str, value: object) -> None:
    model = tiny.small()
    plain = model_digest(model)
    block = model.model.layers[0].mlp
    block.up_proj = Adapter(block.up_proj)
    before = model_digest(model)
    assert before != plain and model_digest(model) == before
    block.up_proj.notes = object()
    assert model_digest(model) == before
    setattr(block.up_proj, name, value)
    assert model_digest(model) != before


def _louder(factor: float) -> Callable[..., Any]:
    return lambda module, args, output: output * factor


def _other_activation(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def _other_scaling(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling *= 4


def _other_epsilon(model: PreTrainedModel) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.1


def _hook(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_forward_hook(_louder(2.0))


def _part_of_a_hook(model: PreTrainedModel) -> None:
    hook = partial(_louder(2.0))
    model.model.layers[0].mlp.register_forward_hook(hook)


def _forward(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.forward = lambda x: x


def _in_c(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.forward = torch.relu


@pytest.mark.parametrize(
    "change",
    [
        *(_other_activation, _other_scaling, _other_epsilon),
        *(_hook, _part_of_a_hook, _forward, _in_c),
    ],
)
def test_what_modules_do_is_part_of_the_model(
    change: Callable[[PreTrainedModel], None],
) -> None:
    model = tiny.small()
    plain = model_digest(model)
    change(model)
    changed = model_digest(model)
    assert changed != plain and model_digest(model) == changed
    again = tiny.small()
    change(again)
    assert model_digest(again) == changed


def test_hooks_that_differ_in_a_number_make_two_models() -> None:
    one, other = tiny.small(), tiny.small()
    one.model.layers[0].register_forward_hook(_louder(2.0))
    other.model.layers[0].register_forward_hook(_louder(3.0))
    assert model_digest(one) != model_digest(other)


@pytest.mark.parametrize("remote", [False, True])
def test_attributes_of_a_model_itself_follow_from_its_configuration(
    remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.small()
    if remote:  # as of code that comes with the weights
        kind = type("Remote", (type(model),), {"__module__": "transformers_modules.x"})
        model.__class__ = kind
    before = model_digest(model)
    model.name_or_path, model.warnings_issued = "elsewhere", {"estimate_tokens": True}
    model.hf_device_map = {"": 0}
    model.train()
    assert model_digest(model) == before


ALLOCATOR = """
from typing import ClassVar
import numpy as np
from absorb_plugin.allocators import Allocator, BaseAllocation

class Moving(Allocator):
    name: ClassVar = "moving"
    needs: ClassVar = "gram"

    def measure(self, weight, gram):
        return SIGN * float(gram.diagonal().sum())

    def allocate(self, groups, sparsity):
        metric = np.array([
            sum(x.measured for x in group.linears.values()) for group in groups
        ])
        low, high = metric.min(), metric.max()
        return BaseAllocation(metric, 0.4 + 0.2 * (metric - low) / (high - low))
"""


def test_an_allocator_that_was_changed_measures_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for sign in (1, -1, 1):
        (tmp_path / "moving.py").write_text(ALLOCATOR.replace("SIGN", str(sign)))
        sys.modules.pop("moving", None)
        importlib.invalidate_caches()
        kind = importlib.import_module("moving").Moving
        with registered(kind):
            cached = allocate(tmp_path / "kept", allocator="moving", strength=0)
            fresh = allocate(None, allocator="moving", strength=0)
        np.testing.assert_array_equal(cached.base.metric, fresh.base.metric)
        found.append(cached.base.metric)
    np.testing.assert_array_equal(found[0], -found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_offloaded_weights_hash_alike_and_where_they_lie(tmp_path: Path) -> None:
    model = tiny.small()
    expected = weights_digest(model)
    offload.set_onload_device(model, "cpu")
    cache = type(model.lm_head._parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "onload", lambda *_: pytest.fail("was onloaded"))
        assert weights_digest(model) == expected


def test_weights_on_the_meta_device_are_refused() -> None:
    with pytest.raises(ValueError, match="profile_cache cannot hash .*meta device"):
        weights_digest(tiny.small().to("meta"))


def test_a_full_disk_costs_the_entry_and_not_the_run(
    tmp_path: Path, logs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = allocate(None)
    original = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        original(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert_equal(allocate(tmp_path), whole)
    assert not list(tmp_path.iterdir())
    told = [line for line in logs if "could not be written (No space left" in line]
    assert {line.startswith("WARNING") for line in told} == {True}


@pytest.mark.parametrize("field", ["profile_cache", "report_dir"])
def test_a_directory_that_cannot_be_is_refused_first(
    tmp_path: Path, measured: list[str], field: str
) -> None:
    (tmp_path / "file").write_text("")
    recipe = [runs.absorption(**{field: tmp_path / "file" / "x"}), runs.pruner()]
    with pytest.raises(ValueError, match=rf"{field}='.*cannot be written to \(Not a d"):
        runs.run(tiny.small(), recipe, tmp_path)
    assert not measured
