# Everything sets itself up: a virtual environment in .venv, installed again when pyproject.toml changes.
# Needed beforehand: Python 3.10 or newer (`make PYTHON=...` to choose one) and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
ARGS ?=

.PHONY: test test-all mutants demo zoo bench notebooks docs release clean

test: $(READY)  ## The gate: formatting, lint, types, tests, documentation.
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test-all: $(READY)  ## The tests with the slow ones, and many more random cases.
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest --slow $(ARGS)

mutants: $(READY)  ## Plants faults in the engine, which its tests must notice; a quarter of an hour (ARGS="--only REGEX": a few).
	$(BIN)/python -m tests.mutants $(ARGS)

demo: $(READY)  ## Trains a ResNet and its conversion on real digits; results in demo-output/.
	$(BIN)/revify demo $(ARGS)

zoo: $(READY)  ## What converts of torchvision, timm and transformers; writes docs/coverage.md (ARGS="--only REGEX": a few).
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[zoo]'
	$(BIN)/python -m zoo $(ARGS)

bench: $(READY)  ## Time and memory of a step, by each engine; writes docs/benchmarks.md (ARGS=--quick: a try).
	$(BIN)/python -m benchmarks $(ARGS)

notebooks: $(READY)  ## The tutorials as notebooks, from their pages.
	$(BIN)/python docs/_notebooks.py

docs: $(READY)  ## The documentation, in site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

release: $(READY)  ## Wheel and sdist in dist/; the README's first block with the wheel, in a fresh environment.
	rm -rf dist build/fresh
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[vision]"
	sed -n '/^```python$$/,/^```$$/{/^```/!p}' README.md > build/first_block.py
	cd build && fresh/bin/python first_block.py && fresh/bin/revify explain resnet18

clean:
	rm -rf $(VENV) site build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
