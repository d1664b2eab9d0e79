# Every command sets up what it needs in .venv. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types cuda-compile cuda-mutants cuda-rig gpu clean

demo: $(VENV)/.installed
	$(BIN)/minilpt predict --format table \
		"a gorgeous , witty , seductive movie ." \
		"the plot is nothing but boilerplate cliches from start to finish , and the jokes are older than that ." \
		"I expected little , and was surprised by how much I laughed ." \
		"It is not good , not bad , just long ."

test: $(VENV)/.installed-test lint types
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not see the mapping of kernels/ and weights/ into the package, so it reads an installed copy.
types: $(VENV)/.installed-test
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p minilpt

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "setuptools>=77" --editable '.[test,lint]'
	touch $@

# What `make test` leaves out of the CUDA rig: NVIDIA's compiler (150 MB of packages), and the mutants (half an hour).
cuda-rig: cuda-compile cuda-mutants

cuda-compile: $(VENV)/.installed-cuda-rig
	CUDA_RIG_REQUIRED=1 $(BIN)/python -m pytest -q tests/test_cuda_compile.py

cuda-mutants: $(VENV)/.installed-test
	PYTHONPATH=tests $(BIN)/python -m cuda_rig.mutants --out benchmarks/results/cuda_mutants.json --command \
		"$(BIN)/python -m pytest -x -q -p no:cacheprovider tests/test_cuda_kernels.py -k 'fifo or preempt' \
		-m \"cuda_source(stem='{stem}') and not gpu\"" kernels/cuda/*.cu

# On a machine with a card: the kernels' and the engine's tests on it, then the benchmark beside PyTorch.
gpu: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable '.[gpu]'
	$(BIN)/python -m pytest -q -m gpu tests
	$(BIN)/python -m benchmarks.gpu --out benchmarks/results/gpu.json

$(VENV)/.installed-cuda-rig: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable '.[cuda-rig]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
