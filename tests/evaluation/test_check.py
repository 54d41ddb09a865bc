"""What is said of a saved checkpoint, and of what is none."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.compressors import BaseCompressor, decompress_module
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import runs, tiny
from llmcompressor.core import reset_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from absorb_plugin.cli.check import _summary
from absorb_plugin.evaluation import shards
from absorb_plugin.evaluation.check import _is_dense, check_checkpoint
from absorb_plugin.evaluation.check_report import LinearZeros
from absorb_plugin.evaluation.plan import COMMON
from absorb_plugin.evaluation.shards import Checkpoint
from absorb_plugin.evaluation.zeros import Count, count_quantized
from absorb_plugin.pruners import PRUNERS

SCHEMES = ["W8A8", "W4A16", "FP8_DYNAMIC", "W4A16_ASYM", "NVFP4A16"]
WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"


def save_pruned(
    out: Path,
    scheme: str | None = None,
    architecture: str = "llama",
    pruning: Mapping[str, Any] = {},
    **fields: Any,
) -> Path:
    """A tiny model through the real `oneshot`."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    model = tiny.make_model(architecture, **(shape if architecture == "llama" else {}))
    recipe = [runs.absorption(**fields), runs.pruner("sparsegpt", **pruning)]
    if scheme:
        kind = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": scheme}
        recipe.append(QuantizationModifier(**kind))
    runs.run(model, recipe, out.parent, output_dir=str(out))
    reset_session()
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pruned(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def plain(saved: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_weights(model: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def expect_problem(model: Path, *words: str, load: bool = False) -> None:
    (problem,) = check_checkpoint(model, load).problems
    assert all(word in problem for word in words), problem


def loaded_zeros(path: Path) -> dict[str, int]:
    model = AutoModelForCausalLM.from_pretrained(path)
    for module in model.modules():
        decompress_module(module)
    return {
        name: int((module.weight == 0).sum())
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def test_a_plain_checkpoint(saved: Path) -> None:
    report = check_checkpoint(saved, load=True)
    assert (report.problems, report.warnings, report.loads) == ([], [], True)
    assert report.format is None and report.dtype == "float32" and not report.tied
    counted = {name: one.count.zeros for name, one in report.linears.items()}
    assert counted == loaded_zeros(saved)
    (stage,) = yaml.safe_load((saved / "recipe.yaml").read_text()).values()
    planned = stage["default_modifiers"]["SparseGPTModifier"]["sparsity"]
    found = [one.planned for one in report.linears.values()]
    assert found == planned[:-1]  # the last is that of the head, which is ignored
    assert report.planned == pytest.approx(0.5)
    assert report.zeros == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_after_quantisation(scheme: str, tmp_path: Path) -> None:
    out = save_pruned(tmp_path / "model", scheme)
    report = check_checkpoint(out)
    assert (report.problems, report.warnings) == ([], [])
    counted = {name: one.count.zeros for name, one in report.linears.items()}
    assert counted == loaded_zeros(out)
    assert report.quantization is not None
    assert report.quantization["bits"] == [8 if "8" in scheme[:3] else 4]
    needs_16_bits = scheme.startswith("W4A16")
    assert report.serve.endswith("--dtype bfloat16") == needs_16_bits


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "FP8_DYNAMIC"])
def test_a_recipe_that_lost_a_pruner_is_told_from_rounding(
    scheme: str, tmp_path: Path
) -> None:
    head, mlp = "re:.*lm_head", "re:.*mlp.*"
    dense = save_pruned(tmp_path / "dense", scheme, pruning={"ignore": [head, mlp]})
    assert check_checkpoint(dense).warnings == []
    pruned = save_pruned(tmp_path / "pruned", scheme, pruning={"sparsity": 0.7})
    recipe = pruned / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("ignore: [", f"ignore: ['{mlp}', ", 1))
    (warning,) = check_checkpoint(pruned).warnings
    assert "6 Linears have zeros and are not in the plan" in warning


@pytest.mark.parametrize(
    ("method", "bits"), [("gptq", 4), ("awq", 4), ("bitsandbytes", None), ("fp8", None)]
)
def test_other_methods_of_quantisation(plain: Path, method: str, bits: int) -> None:
    def pack(tensors: dict) -> None:
        weight = tensors.pop(DOWN)
        codes = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
        tensors[DOWN.replace("weight", "qweight")] = codes

    change_weights(plain, pack)
    quantization = {"quant_method": method, "bits": bits, "format": method}
    change_json(plain / "config.json", quantization_config=quantization)
    report = check_checkpoint(plain)
    assert report.problems == [] and report.zeros is None
    assert report.warnings == [f"quantised by {method}: zeros are not counted"]
    assert report.runtimes["vLLM, SGLang"] == "not known to this check"
    told = f"float32, {method}, 4 bits, untied" if bits else f"{method}, untied"
    assert told in _summary(report)
    change_json(plain / "config.json", quantization_config={"load_in_4bit": True})
    assert check_checkpoint(plain).other_method == "an unknown method"


def scheme_of(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("fp8", "quantization_config='fp8' is no object"),
        (["fp8"], "quantization_config=['fp8'] is no object"),
        (scheme_of(num_bits="four"), "num_bits='four': input should be a valid"),
        ({"config_groups": ["Linear"]}, "not understood: config_groups="),
        ({"config_groups": {"W9": ["Linear"]}}, "not understood: "),
    ],
)
def test_quantisations_that_are_not_understood(
    plain: Path, quantization: Any, message: str
) -> None:
    change_json(plain / "config.json", quantization_config=quantization)
    report = check_checkpoint(plain)
    assert not report.problems
    (told,) = [warning for warning in report.warnings if message in warning]
    assert "https://" not in told


def test_a_quantisation_by_the_name_of_its_scheme(plain: Path) -> None:
    saved = {"config_groups": {"W8A8": ["Linear"]}, "format": "int-quantized"}
    change_json(plain / "config.json", quantization_config=saved)
    report = check_checkpoint(plain)
    assert report.quantization == {
        "method": None,
        "format": "int-quantized",
        "bits": [8],
    }
    assert not any("understood" in warning for warning in report.warnings)


@pytest.mark.parametrize("columns", [64, 72, 100])
@pytest.mark.parametrize(
    "form, arguments",
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 3, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ],
)
def test_codes_are_counted_as_decompression_counts(
    form: str, arguments: dict, columns: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(33, columns) * (torch.rand(33, columns) < 0.5)
    weight[0, :3] = -0.0
    scale = torch.full((33, 1), 0.05)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**arguments)
    )
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    dense = compressor.decompress(stored, scheme)["weight"]
    found = count_quantized(stored, scheme, form)
    assert (found.zeros, found.weights) == (int((dense == 0).sum()), dense.numel())
    assert found.finite and found.zeros > 0
    stored["weight_scale"] = torch.zeros_like(scale)  # then every code means zero
    assert count_quantized(stored, scheme, form).share == 1
    stored["weight_scale"] = torch.full_like(scale, torch.inf)
    assert not count_quantized(stored, scheme, form).finite


def test_the_model_is_not_loaded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    assert check_checkpoint(saved).zeros is not None


def test_large_tensors_are_read_in_pieces(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Checkpoint(saved).read(DOWN)
    monkeypatch.setattr(shards, "PIECE", 1000)
    pieces = list(Checkpoint(saved).pieces(DOWN))
    assert max(piece.numel() for piece in pieces) <= 1000
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_neox", "opt"])
def test_architectures(architecture: str, tmp_path: Path) -> None:
    out = save_pruned(tmp_path / "model", architecture=architecture)
    report = check_checkpoint(out)
    assert not report.problems and report.planned == pytest.approx(0.5)
    blocks = report.blocks()
    assert len(blocks) == 3
    pruned = [one.planned is not None for ones in blocks.values() for one in ones]
    assert all(pruned) and len(pruned) >= 12


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_models_that_see_images(kind: str, tmp_path: Path) -> None:
    """A block of the vision tower has the number and the names of a decoder block."""
    model = tiny.with_images(kind)
    runs.run(model, [runs.absorption(), runs.pruner()], tmp_path, output_dir=tmp_path)
    reset_session()
    report = check_checkpoint(tmp_path)
    assert not report.problems and report.planned == pytest.approx(0.5)
    for name, one in report.linears.items():
        assert (one.planned is None) == ("vision" in name or "projector" in name), name
        assert (one.planned is None) == (one.count.zeros == 0), name


def test_targets_per_linear(tmp_path: Path) -> None:
    out = save_pruned(tmp_path / "model", granularity="linear", allocator="owl")
    report = check_checkpoint(out)
    assert not report.problems
    assert len({one.planned for one in report.linears.values()}) > 2


def test_several_files(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shutil.copy(saved / "recipe.yaml", tmp_path)
    report, expected = check_checkpoint(tmp_path), check_checkpoint(saved)
    assert report.files > 2 and not report.problems
    assert report.linears == expected.linears


def test_the_files_are_those_that_transformers_loads(
    saved: Path, tmp_path: Path
) -> None:
    """A directory that was saved into twice, dense in several files at first."""
    dense = tiny.make_model("llama", hidden_size=128, num_hidden_layers=2)
    dense.save_pretrained(tmp_path, max_shard_size="100KB")
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    report = check_checkpoint(tmp_path)
    assert report.linears == check_checkpoint(saved).linears and report.files == 1
    (warning,) = report.warnings
    assert "transformers reads the first" in warning and "Delete" in warning
    # an index that nobody reads may be anything
    (tmp_path / f"{WEIGHTS}.index.json").write_text("{}")
    assert check_checkpoint(tmp_path).warnings == [warning]


def test_weights_that_the_config_names(plain: Path) -> None:
    expected = check_checkpoint(plain).linears
    (plain / WEIGHTS).rename(plain / "other.safetensors")
    change_json(plain / "config.json", transformers_weights="other.safetensors")
    assert check_checkpoint(plain, load=True).linears == expected


def test_blocks_beyond_the_plan(plain: Path) -> None:
    def fill(tensors: dict) -> None:
        weight = tensors[DOWN]
        tensors[DOWN] = torch.where(weight == 0, 0.01, weight)
        tensors[DOWN][0, 0] = 0.0
        tensors[DOWN][1:22] = 0.0

    planned = check_checkpoint(plain).as_dict()["blocks"][1]["planned"]
    change_weights(plain, fill)
    expect_problem(plain, "block model.layers.1", f"planned are {planned:.4f}")

    def empty(tensors: dict) -> None:
        tensors[DOWN][:127] = 0.0

    change_weights(plain, empty)
    expect_problem(plain, "block model.layers.1", f"planned are only {planned:.4f}")


def test_a_linear_without_weights(plain: Path) -> None:
    change_weights(plain, lambda tensors: tensors[DOWN].zero_())
    problems = check_checkpoint(plain).problems
    assert any("no weight left" in one and DOWN[:-7] in one for one in problems)


def test_a_small_linear_that_was_left_dense(plain: Path) -> None:
    name = DOWN.replace("mlp.down_proj", "self_attn.k_proj")
    change_weights(plain, lambda tensors: tensors[name].fill_(1.0))
    report = check_checkpoint(plain)
    assert not report.problems
    assert any("left dense" in one and name[:-7] in one for one in report.warnings)


def test_a_block_of_which_a_part_was_not_pruned(plain: Path) -> None:
    change_weights(plain, lambda tensors: tensors[DOWN].fill_(1.0))
    expect_problem(plain, "block model.layers.1", "planned are")


def test_nothing_was_pruned(saved: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    tiny.make_model(
        "llama", hidden_size=128, intermediate_size=128, num_hidden_layers=2
    ).save_pretrained(dense)
    shutil.copy(saved / "recipe.yaml", dense)
    assert len(check_checkpoint(dense).problems) == 2  # one for each block


def test_nan(plain: Path) -> None:
    name = "model.norm.weight"
    change_weights(plain, lambda tensors: tensors[name].fill_(torch.nan))
    expect_problem(plain, "NaN or infinity", name)


@pytest.mark.parametrize(
    "place", ["sparsity_config", "quantization_config", "compression_config"]
)
def test_a_sparsity_config(plain: Path, place: str) -> None:
    sparsity = {"format": "dense", "targets": ["Linear"]}
    nested = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    value = sparsity if place == "sparsity_config" else nested
    change_json(plain / "config.json", **{place: value})
    expect_problem(plain, "`sparsity_config`", "vLLM refuses", "delete the field")
    change_json(plain / "config.json", **{place: {}})
    assert not check_checkpoint(plain).problems


def test_a_head_that_is_missing(plain: Path) -> None:
    change_weights(plain, lambda tensors: tensors.pop("lm_head.weight"))
    expect_problem(plain, "lm_head.weight is in none of the files")
    change_json(plain / "config.json", tie_word_embeddings=True)
    report = check_checkpoint(plain, load=True)
    assert report.tied and report.loads and not report.problems


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_norm_or_embeddings_that_are_missing(plain: Path, name: str) -> None:
    change_weights(plain, lambda tensors: tensors.pop(name))
    expect_problem(plain, f"{name} for one", "random numbers")
    expect_problem(plain, "missing", load=True)


def test_where_transformers_cannot_say_what_is_missing(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no meta tensors")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    change_weights(plain, lambda tensors: tensors.pop("model.norm.weight"))
    report = check_checkpoint(plain)
    assert not report.problems
    unknown, missing = report.warnings
    assert "does not say" in unknown and "no meta tensors" in unknown
    assert "model.norm" in missing and "up at random" in missing


def test_a_linear_that_is_missing(plain: Path) -> None:
    change_weights(plain, lambda tensors: tensors.pop(DOWN))
    expect_problem(plain, "1 Linears of recipe.yaml are not in the files", DOWN[:-7])


def test_a_name_within_a_longer_one_is_told_as_well(plain: Path) -> None:
    """A problem with the longer one says nothing of it."""
    name = "model.norm.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}_old"] = tensors.pop(name).fill_(torch.nan)

    change_weights(plain, change)
    nan, absent = check_checkpoint(plain).problems
    assert f"NaN or infinity, {name}_old" in nan
    assert "1 weights are in none of the files" in absent and name in absent


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    """transformers cannot make one tensor of the others, and says so by an error."""
    out = save_pruned(tmp_path / "model", architecture="mixtral")
    (out / "recipe.yaml").unlink()
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    change_weights(out, lambda tensors: tensors.pop(name))
    report = check_checkpoint(out)
    assert any("does not say" in x for x in report.warnings)
    assert report.runtimes["transformers"].startswith("perhaps not")
    assert check_checkpoint(out, load=True).loads is False


def test_linears_under_names_that_only_transformers_knows(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "absorb_plugin.evaluation.check_linears.stored_names",
        lambda modules, stored: {n: n for n in stored if "q_proj" not in n},
    )
    report = check_checkpoint(plain)
    assert not report.problems
    assert any("2 Linears of recipe.yaml are in the" in x for x in report.warnings)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size"])
def test_a_config_of_another_model(plain: Path, field: str) -> None:
    change_json(plain / "config.json", **{field: 48})
    expect_problem(plain, "another shape than config.json says", "and not")


def test_a_linear_of_another_shape(plain: Path) -> None:
    change_weights(plain, lambda x: x.update({DOWN: x[DOWN][:64].clone()}))
    expect_problem(plain, DOWN, "64 x 128, and not 128 x 128")


@pytest.mark.parametrize(
    "scheme, part", [("W8A8", "weight_scale"), ("W4A16", "weight_shape")]
)
def test_a_quantised_weight_without_its_scale(
    scheme: str, part: str, tmp_path: Path
) -> None:
    model = save_pruned(tmp_path / "model", scheme)
    name = DOWN.replace("weight", part)
    change_weights(model, lambda tensors: tensors.pop(name))
    expect_problem(model, f"{name} is in none of the files")


@pytest.mark.parametrize("architecture", ["gemma3", "opt"])
def test_a_tied_head_by_default(architecture: str, tmp_path: Path) -> None:
    """transformers 4 writes what differs from its class's defaults."""
    tiny.make_model(architecture, tie_word_embeddings=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is True
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = check_checkpoint(tmp_path, load=True)
    assert report.tied and report.loads and not report.problems


def test_code_of_the_model_is_not_asked_for(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    (plain / "code.py").write_text("raise SystemExit('was run')")
    files = {"AutoConfig": "code.MyConfig"}
    change_json(plain / "config.json", model_type="my_lm", auto_map=files)
    warnings = check_checkpoint(plain).warnings
    assert any("cannot build this model" in x and "custom code" in x for x in warnings)


def test_a_head_that_would_be_lost(plain: Path) -> None:
    change_json(plain / "config.json", tie_word_embeddings=True)
    expect_problem(plain, "two that differ")


def test_a_pruned_head(plain: Path) -> None:
    change_weights(plain, lambda tensors: tensors["lm_head.weight"][:32].zero_())
    report = check_checkpoint(plain)
    assert any("50.0% of lm_head are zero" in one for one in report.warnings)


def test_what_transformers_does_not_load(plain: Path) -> None:
    change_weights(plain, lambda tensors: tensors.pop("model.norm.weight"))
    expect_problem(plain, "model.norm.weight")
    expect_problem(plain, "1 missing keys", "model.norm.weight", load=True)
    change_json(plain / "config.json", num_attention_heads=0)
    report = check_checkpoint(plain, load=True)
    assert report.loads is False and any("cannot build" in x for x in report.warnings)


@pytest.mark.parametrize("names", [None, []])
def test_a_config_without_architectures(plain: Path, names: list | None) -> None:
    expected = check_checkpoint(plain, load=True)
    change_json(plain / "config.json", architectures=names)
    assert check_checkpoint(plain, load=True) == expected and expected.loads


def test_recipes_that_say_nothing(plain: Path) -> None:
    recipe = plain / "recipe.yaml"
    recipe.unlink()
    report = check_checkpoint(plain)
    assert not report.problems and report.planned is None
    assert any("no recipe.yaml" in warning for warning in report.warnings)
    fields = {"AbsorptionAllocationModifier": {}, "GPTQModifier": {}}
    recipe.write_text(yaml.safe_dump({"stage": {"a_modifiers": fields}}))
    report = check_checkpoint(plain)
    assert not report.problems and len(report.warnings) == 2


WANDA = "a_stage:\n  a_modifiers:\n    WandaPruningModifier: "
DAMAGED: dict[str, tuple[str, str]] = {
    "empty": ("", "recipe.yaml is no recipe of llm-compressor: it is empty"),
    "list": ("[1, 2]", "recipe.yaml is no recipe of llm-compressor"),
    "yaml": ("a: [", "recipe.yaml is no recipe of llm-compressor"),
    "latin-1": ("a: caf\xe9", "recipe.yaml is no recipe of llm-compressor: 'utf-8'"),
    "sparsity": (WANDA + "{sparsity: hello}", "WandaPruningModifier: sparsity='hello'"),
    "no sparsity": (WANDA + "{sparsity: null}", "sparsity=None is no number"),
    "regex": (WANDA + "{sparsity: 0.5, targets: ['re:*x']}", "targets holds 're:*x'"),
    "targets": (WANDA + "{sparsity: 0.5, targets: [1]}", "targets=[1] is no list"),
    "mask": (WANDA + "{sparsity: 0.5, mask_structure: x}", "mask_structure='x'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_recipe(plain: Path, case: str) -> None:
    """The rest of the check goes on."""
    content, message = DAMAGED[case]
    (plain / "recipe.yaml").write_bytes(content.encode("latin-1"))
    change_weights(plain, lambda tensors: tensors[DOWN].fill_(torch.nan))
    report = check_checkpoint(plain)
    told, nan = report.problems
    assert message in told and "recipe.yaml" in told and "NaN" in nan
    assert report.zeros is not None and not report.warnings


@pytest.mark.parametrize("names", ["{}", "{targets: Linear, ignore: lm_head}"])
def test_defaults_of_a_recipe(plain: Path, names: str) -> None:
    fields = names.replace("{", "{sparsity: 0.5, ")
    (plain / "recipe.yaml").write_text(WANDA + fields)
    assert check_checkpoint(plain).planned == 0.5


@pytest.mark.parametrize(
    ("kind", "planned"),
    [
        ("WandaPruningModifier: {sparsity: 0.25", 0.5),
        ("SparseGPTModifier: {preserve_sparsity_mask: true, sparsity: 0.25", 0.5),
        ("SparseGPTModifier: {sparsity: 0.25", 0.25),
    ],
)
def test_a_second_pruning_that_asks_for_less(
    plain: Path, kind: str, planned: float
) -> None:
    """What keeps zeros leaves those of the first."""
    targets = "targets: [Linear], ignore: [lm_head]}"
    (plain / "recipe.yaml").write_text(
        f"{WANDA}{{sparsity: 0.5, {targets}\nb_stage:\n  b_modifiers:\n    "
        f"{kind}, {targets}\n"
    )
    assert check_checkpoint(plain).planned == planned


def test_zeros_that_something_filled_in_between(plain: Path) -> None:
    targets = "targets: [Linear], ignore: [lm_head]}"
    (plain / "recipe.yaml").write_text(
        f"{WANDA}{{sparsity: 0.75, {targets}\nb_stage:\n  b_modifiers:\n    "
        "SpinQuantModifier: {rotations: [R1]}\n    "
        f"WandaPruningModifier: {{sparsity: 0.5, {targets}\n"
    )
    assert check_checkpoint(plain).planned == 0.5


@pytest.mark.parametrize("kind", ["REAPPruningModifier", "SomebodysModifier"])
def test_a_sparsity_that_is_not_of_weights(plain: Path, kind: str) -> None:
    """Of experts, as REAP has it; it has neither targets nor a mask_structure."""
    recipe = plain / "recipe.yaml"
    recipe.write_text(f"{recipe.read_text()}    {kind}: {{sparsity: 0.25}}\n")
    report = check_checkpoint(plain)
    assert not report.problems and report.planned == pytest.approx(0.5)
    recipe.write_text(f"a_stage:\n  a_modifiers:\n    {kind}: {{sparsity: [x]}}\n")
    report = check_checkpoint(plain)
    assert not report.problems and report.planned is None


def test_a_subclass_of_a_known_pruner(plain: Path) -> None:
    """Its mask_structure tells."""
    fields = "{sparsity: 0.5, mask_structure: '0:0', targets: [Linear]}"
    text = WANDA.replace("WandaPruning", "Somebodys") + fields
    (plain / "recipe.yaml").write_text(text)
    assert check_checkpoint(plain).planned == 0.5


def test_a_recipe_with_python_objects(plain: Path) -> None:
    """So llm-compressor saves `type: int` of a group that was given as a dictionary."""
    recipe, kind = plain / "recipe.yaml", "compressed_tensors.quantization.Kind"
    recipe.write_text(
        recipe.read_text() + "  quantize_modifiers:\n    QuantizationModifier:\n"
        f"      type: !!python/object/apply:{kind} [int]\n"
    )
    assert check_checkpoint(plain).planned == pytest.approx(0.5)


def test_a_recipe_of_another_model(plain: Path) -> None:
    recipe = plain / "recipe.yaml"
    text, count = re.subn(r"sparsity: \[[^,]+, ", "sparsity: [", recipe.read_text())
    assert count == 1
    recipe.write_text(text)
    expect_problem(plain, "14 sparsities", "15 modules", "another model")


def point(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def index(model: Path, name: str, file: str) -> None:
    content = {"weight_map": {name: file}}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(content))
    (model / WEIGHTS).rename(model / "whole.safetensors")


ERRORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "directory": (shutil.rmtree, "no such directory"),
    "config": (lambda m: (m / "config.json").unlink(), "has no config.json"),
    "adapter": (
        lambda m: (m / "config.json").rename(m / "adapter_config.json"),
        "is an adapter .* merge it",
    ),
    "json": (lambda m: (m / "config.json").write_text("{"), "not JSON"),
    "config pointer": (lambda m: point(m / "config.json"), "pointer of Git LFS"),
    "pointer": (lambda m: point(m / WEIGHTS), "pointer of Git LFS.*git lfs pull"),
    "cut short": (lambda m: cut(m / WEIGHTS), "cut short.*again"),
    "header": (lambda m: (m / WEIGHTS).write_bytes(b"abc"), "cut short.*again"),
    "weights": (lambda m: (m / WEIGHTS).unlink(), rf"has no weights \({WEIGHTS}"),
    "other format": (
        lambda m: (m / WEIGHTS).rename(m / "pytorch_model.bin"),
        "pytorch_model.bin is another format",
    ),
    "no index": (
        lambda m: (m / WEIGHTS).rename(m / "model-00001-of-00002.safetensors"),
        "several files but no",
    ),
    "missing file": (
        lambda m: index(m, DOWN, "model-00002-of-00002.safetensors"),
        "lacks 1 of 1 files .* model-00002-of-00002",
    ),
    "wrong index": (
        lambda m: index(m, "model.layers.9.weight", "whole.safetensors"),
        "model.layers.9.weight for one: index and files",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_read(plain: Path, case: str) -> None:
    break_it, message = ERRORS[case]
    break_it(plain)
    with pytest.raises((OSError, ValueError), match=message):
        check_checkpoint(plain)


def test_a_directory_with_a_space(plain: Path) -> None:
    spaced = plain.rename(plain.with_name("my model"))
    assert check_checkpoint(spaced).serve == f"vllm serve '{spaced}'"


def test_a_file_is_no_directory(plain: Path) -> None:
    with pytest.raises(NotADirectoryError, match="name the directory"):
        check_checkpoint(plain / "config.json")


def test_the_pruners_told_by_name_are_ours() -> None:
    """`absorb check` knows these without importing llm-compressor."""
    assert {pruner.modifier.__name__ for pruner in PRUNERS.values()} >= {*COMMON}


def test_less_than_a_weight_of_every_row_is_none(plain: Path) -> None:
    """Of rows of 64 columns Wanda takes none where 1 % is planned."""
    found = LinearZeros("block", Count(0, 64 * 64, True), 64, 0.01)
    assert not _is_dense(found)
    more = replace(found, planned=0.02)
    assert _is_dense(more)
    assert not _is_dense(replace(more, count=Count(64, 64 * 64, True)))
