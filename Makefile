# `make help` lists every target. Each one sets up .venv by itself when it has to.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# uv does not read pip's variable; on a machine that points pip at local wheels, uv looks there too.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# The suite starts hundreds of processes: without bytecode on disk each of them compiles every library that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint types bench docs format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: .venv/.all-cpu  ## train, evaluate, report and serve a small model (ARGS="--no-serve --minutes 4")
	$(BIN)/kajiya demo $(ARGS)

test: .venv/.test  ## the suite, under 12 minutes on 2 cores (ARGS="-k name")
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --durations 10 $(ARGS)

test-slow: .venv/.test  ## what takes minutes: matrices of kills, soaks
	$(BIN)/python -m pytest -n 2 -m slow --timeout 800 --durations 25 $(ARGS)

lint: .venv/.lint  ## ruff: style and mistakes
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: .venv/.lint  ## mypy, strict
	$(BIN)/mypy

format: .venv/.lint  ## ruff: format and mend what can be
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

bench: .venv/.test  ## side by side with the Hugging Face Trainer, in one run
	$(BIN)/python benchmarks/train_throughput.py $(ARGS)

docs: .venv/.docs  ## the site, into site/
	$(BIN)/mkdocs build --strict

clean:  ## remove the environment, caches and built files (artifacts and runs stay)
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Kajiya needs Python 3.11 or newer; set PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	touch $@

# A CPU build of torch is taken where one can be found; elsewhere the ordinary wheel.
.venv/.%: .venv/.uv pyproject.toml requirements/constraints.txt
	$(BIN)/uv pip install --python $(BIN)/python --constraint requirements/constraints.txt --editable '.[$*]'
	touch $@
