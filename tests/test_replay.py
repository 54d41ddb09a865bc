"""What is saved: a plain checkpoint whose recipe replays without the plugin."""

import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny
import yaml
from transformers import AutoModelForCausalLM

REPLAY = """
import sys
sys.path.insert(0, sys.argv[4])
import torch
torch.set_num_threads(1)
import tiny
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

assert "absorb_plugin" not in sys.modules
dense, recipe, out = sys.argv[1:4]
set_seed(0)
oneshot(
    model=AutoModelForCausalLM.from_pretrained(dense),
    tokenizer=AutoTokenizer.from_pretrained(dense),
    recipe=recipe,
    dataset=tiny.make_dataset(6),
    num_calibration_samples=6,
    max_seq_length=16,
    output_dir=out,
)
assert "absorb_plugin" not in sys.modules
"""


@pytest.mark.parametrize(
    "kind, fields",
    [
        ("wanda", {"targets": ["LlamaDecoderLayer"]}),
        ("sparsegpt", {"ignore": ["lm_head", "re:.*down_proj$"]}),
        ("wanda", {"targets": "LlamaDecoderLayer", "granularity": "linear"}),
    ],
    ids=["wanda", "sparsegpt", "linear"],
)
def test_saved_recipe_replays_without_us(
    tmp_path: Path, kind: str, fields: dict
) -> None:
    fields = dict(fields)
    granularity = fields.pop("granularity", "block")
    model = tiny.make_model("llama", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    recipe = [runs.absorption(granularity=granularity), runs.pruner(kind, **fields)]
    runs.run(model, recipe, tmp_path, output_dir=str(out))
    tiny.make_tokenizer(bos=False).save_pretrained(tmp_path / "dense")

    saved = yaml.safe_load((out / "recipe.yaml").read_text())
    (stage,) = saved.values()
    (modifiers,) = stage.values()
    assert list(modifiers) == [runs.PRUNERS[kind].__name__]
    assert isinstance(modifiers[runs.PRUNERS[kind].__name__]["sparsity"], list)
    assert "absorb" not in (out / "recipe.yaml").read_text().lower()

    again = tmp_path / "again"
    subprocess.run(
        [
            sys.executable,
            "-c",
            REPLAY,
            str(tmp_path / "dense"),
            str(out / "recipe.yaml"),
            str(again),
            str(Path(__file__).parent),
        ],
        check=True,
    )
    loaded = [AutoModelForCausalLM.from_pretrained(path) for path in (out, again)]
    tiny.assert_same(*[tiny.snapshot(model) for model in loaded])
    tiny.assert_same(tiny.snapshot(loaded[0]), tiny.snapshot(model))
