"""Every example runs as it stands, but for the model, the data and their sizes."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.words import make_model, make_tokenizer, words
from transformers import AutoModelForCausalLM

from absorb_plugin.evaluation.perplexity import linear_sparsity

EXAMPLES = Path(__file__).parent.parent / "integration" / "examples"
DDP = "llama3_8b_ddp.py"


def with_constants(script: Path, constants: dict[str, Any]) -> str:
    """The script, with other values for constants that it sets at its top level."""
    tree = ast.parse(script.read_text())
    left = dict(constants)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in left:
                node.value = ast.copy_location(ast.Constant(left.pop(name)), node)
    assert not left, f"{script.name} sets no {sorted(left)}"
    return ast.unparse(tree)


@pytest.fixture
def constants(tmp_path: Path) -> dict[str, Any]:
    """A tiny model and a data set of a few texts, as directories."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": words(24, seed)}) for seed in range(8)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation.jsonl").write_text("\n".join(rows))
    return {
        "MODEL_ID": str(tmp_path / "model"),
        "DATASET_ID": str(tmp_path / "data"),
        "NUM_CALIBRATION_SAMPLES": 8,
        "MAX_SEQUENCE_LENGTH": 24,
        "SAVE_DIR": str(tmp_path / "out"),
    }


def check_output(constants: dict[str, Any], quantized: bool = False) -> None:
    out = Path(constants["SAVE_DIR"])
    config = json.loads((out / "config.json").read_text())
    assert ("quantization_config" in config) == quantized
    model = AutoModelForCausalLM.from_pretrained(out)
    # SparseGPT's zeros, and in FP8 those that rounding adds
    assert linear_sparsity(model) == pytest.approx(0.6, abs=0.02)
    assert (out / "tokenizer.json").is_file()
    profile = json.loads(Path(f"{out}-report/profile.json").read_text())
    assert profile["budget"] == 0.6


def test_all_examples_are_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, DDP}


SCRIPTS = ["llama3_8b.py", "llama3_8b_fp8.py", "llama3_70b_offload.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_example(
    name: str, constants: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    script = with_constants(EXAMPLES / name, constants)
    exec(compile(script, name, "exec"), {"__name__": "__main__"})
    check_output(constants, quantized="fp8" in name)
    assert "<s>" in capsys.readouterr().out  # the sample


# llm-compressor's init_dist asks for an accelerator; gloo needs none.
DRIVER = """
import runpy, sys
import compressed_tensors.distributed, compressed_tensors.offload.load, torch
torch.set_num_threads(1)
# A machine with little shared memory would put even this model on the disk.
compressed_tensors.offload.load._get_shared_memory = lambda *sizes: 64 * 2**30
if not torch.accelerator.is_available():
    start = torch.distributed.init_process_group
    compressed_tensors.distributed.init_dist = lambda: start("gloo")
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_torchrun(constants: dict[str, Any], tmp_path: Path) -> None:
    """Two processes, each with half of the samples."""
    (tmp_path / "example.py").write_text(with_constants(EXAMPLES / DDP, constants))
    (tmp_path / "driver.py").write_text(DRIVER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    processes = ["--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, *processes, str(tmp_path / "driver.py"), "example.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    check_output(constants)
