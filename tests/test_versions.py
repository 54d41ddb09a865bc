"""What absorb_plugin relies on in llm-compressor beside what the other tests run."""

import importlib.metadata
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import runs, tiny
from llmcompressor.core import reset_session
from llmcompressor.modifiers import ModifierFactory
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import (
    PRUNABLE_LAYER_TYPES,
    SparsityModifierBase,
)

from absorb_plugin import AbsorptionAllocationModifier
from absorb_plugin.pruners import adapter

pytestmark = pytest.mark.contract


@pytest.fixture(autouse=True)
def not_warned_yet() -> Iterator[None]:
    adapter._warn_of_version.cache_clear()
    yield
    adapter._warn_of_version.cache_clear()


def test_this_version_is_one_of_the_tested(warnings: list[str]) -> None:
    installed = importlib.metadata.version("llmcompressor")
    adapter._warn_of_version(installed)
    assert not warnings, f"add {installed} to NEWEST_TESTED and docs/compatibility.md"


@pytest.mark.parametrize("installed", ["0.15.0", "1.0", "0.15.0.dev3+g12ab"])
def test_a_newer_version_warns_once_and_runs(
    installed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
) -> None:
    monkeypatch.setattr(adapter, "version", lambda name: installed)
    for _ in range(2):
        model, pruner = tiny.make_model("llama", num_hidden_layers=2), runs.pruner()
        runs.run(
            model, [runs.absorption(strength=0), pruner], tmp_path, pipeline="basic"
        )
        assert isinstance(pruner.sparsity, list)
        reset_session()
    told = [message for message in warnings if "was tested up to" in message]
    assert len(told) == 1 and installed in told[0]


@pytest.mark.parametrize("installed", ["0.12.0", "0.13.0", "0.14.0.1", "0.14.99"])
def test_no_warning_up_to_the_newest_tested(
    installed: str, warnings: list[str]
) -> None:
    adapter._warn_of_version(installed)
    assert not warnings


@pytest.mark.parametrize("targets", ["Linear", "LlamaDecoderLayer"])
@pytest.mark.parametrize("kind", list(runs.PRUNERS))
def test_upstream_owl_does_not_run(kind: str, targets: str, tmp_path: Path) -> None:
    """
    Fails once `sparsity_profile: owl` works in llm-compressor. Then say so where README
    says that it does not, and compare its allocation with that of `allocator: owl`.
    """
    owl = {"sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.08}
    modifier = runs.pruner(kind, targets=[targets], **owl)
    with pytest.raises(ValueError, match="Cannot invoke event before initializing"):
        runs.run(tiny.make_model("llama", num_hidden_layers=2), modifier, tmp_path)


def test_names_we_rely_on() -> None:
    assert "Linear" in PRUNABLE_LAYER_TYPES
    assert {"sparsity", "sparsity_profile", "mask_structure", "targets", "ignore"} <= (
        SparsityModifierBase.model_fields.keys()
    )
    assert "_target_layers" in SparsityModifierBase.__private_attributes__
    made = ModifierFactory.create(
        "AbsorptionAllocationModifier", allow_registered=True, allow_experimental=False
    )
    assert isinstance(made, AbsorptionAllocationModifier)
    assert "allow_registered" in inspect.signature(ModifierFactory.create).parameters
