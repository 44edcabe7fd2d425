# halfseen: every command a newcomer needs. Each target sets up what it uses.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TEST_ARGS ?= -n 2 --dist loadfile
# Three drills at a time, each worker with a cluster of its own: drills mostly wait for Slurm.
DRILL_ARGS ?= -n 3 --maxschedchunk 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test drills lint format types clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(STAMP)  ## .venv with the tested package versions (constraints.txt)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=23" -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)  ## pretrain, fine-tune, compare with scratch; about five minutes on two CPU cores
	$(BIN)/halfseen demo

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest $(TEST_ARGS)

drills: $(STAMP)  ## every drill on a real Slurm of virtual nodes (root, Debian: tests/slurm/README.md)
	bash tests/slurm/cluster install
	$(BIN)/python -m pytest -m slurm $(DRILL_ARGS)

lint: $(STAMP)  ## ruff: lint and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, by path
	$(BIN)/mypy halfseen pretrain finetune launch tools

format: $(STAMP)  ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the venv, caches and builds (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
