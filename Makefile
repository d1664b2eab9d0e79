# Every command sets up what it needs in .venv. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types clean

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

clean:
	rm -rf $(VENV) build dist *.egg-info
