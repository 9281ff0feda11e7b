# `make` lists the targets. PYTHON picks the interpreter that makes .venv, TORCH the build: auto, cpu or cuda.
# ARGS is handed on to training and to pytest, for example ARGS="--override training.seed=1" or ARGS="-k model".
PYTHON ?= $(firstword $(shell command -v python3.11 2>/dev/null) $(shell command -v python3 2>/dev/null))
TORCH ?= auto
NO_PYTHON = no python3.11 on the path: install Python 3.11 (Debian: apt-get install python3.11-venv)
SET_UP = test -n "$(PYTHON)" || { echo "$(NO_PYTHON)"; exit 1; }; "$(PYTHON)" tools/setup.py --torch $(TORCH)

.DEFAULT_GOAL := help
.PHONY: help setup setup-test test quickstart resume

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv from requirements.lock, and the software-GL libraries; quick when they are there
	@$(SET_UP)

# Chromium, a few hundred MB, is for the tests alone: they open the report in it.
setup-test:
	@$(SET_UP) --browser

test: setup-test  ## lint, check types, run the tests
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/python -m pytest $(ARGS)

quickstart: setup  ## improve the warm-started tiny pi0 on LIBERO by RIPT; table, curve, video and report at the end
	.venv/bin/python 13_train_production_ready.py --config_path configs/quickstart.yaml $(ARGS)

resume: setup  ## go on with a quickstart that was interrupted
	.venv/bin/python 13_train_production_ready.py --config_path configs/quickstart.yaml --resume $(ARGS)
