# Every command sets up what it needs in .venv. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types cuda-compile cuda-mutants cuda-rig gpu lock wheel sbom oldest newest portable clean

# Of the packages that serve this file only; tests and builds have theirs from pyproject.toml and .ci/locked.txt.
UV := uv==0.13.9
CYCLONEDX := cyclonedx-bom==7.5.0

# Tests whose oracle is PyTorch, or whose subject no version of a package and no instruction set changes.
TORCH_TESTS := cuda_equivalence equivalence golden rank
WITHOUT_TORCH := $(TORCH_TESTS:%=--ignore=tests/test_%.py) --ignore-glob='tests/test_cuda_*'

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

# First what is locked, then what is left: PyTorch, of which each platform has another build.
$(VENV)/.installed-test: pyproject.toml .ci/locked.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement .ci/locked.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test,lint]'
	touch $(VENV)/.installed $@

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

# Without torch, which the override takes out together with what it needs.
lock: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet $(UV)
	echo "torch; sys_platform == 'none'" | $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --upgrade \
		--generate-hashes --no-emit-index-url --no-emit-find-links --no-emit-package torch --no-annotate \
		--custom-compile-command "make lock" --override - --extra test --extra lint \
		--output-file .ci/locked.txt pyproject.toml

wheel: $(VENV)/.installed-test
	.ci/wheel $(BIN)/python dist

# What a user of the wheel gets, with versions and licences.
sbom: wheel
	rm -rf build/sbom
	$(PYTHON) -m venv build/sbom/tool
	build/sbom/tool/bin/python -m pip install --quiet $(CYCLONEDX)
	$(PYTHON) -m venv --without-pip build/sbom/user
	$(BIN)/python -m pip --python build/sbom/user/bin/python install --quiet dist/minilpt-*.whl
	build/sbom/tool/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file dist/minilpt.cdx.json build/sbom/user/bin/python

# The lower bounds of pyproject.toml themselves, and whatever is newest today: make oldest PYTHON=python3.10
oldest: RESOLUTION := --resolution lowest-direct
newest: RESOLUTION := --upgrade
oldest newest:
	rm -rf build/$@
	$(PYTHON) -m venv build/$@
	build/$@/bin/python -m pip install --quiet $(UV)
	build/$@/bin/uv pip install --python build/$@/bin/python $(RESOLUTION) --editable '.[test-base]'
	build/$@/bin/python -m pytest $(WITHOUT_TORCH)

portable: $(VENV)/.installed-test
	MINILPT_ISA=portable $(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build dist *.egg-info
