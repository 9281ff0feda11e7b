# `make` lists the targets. PYTHON picks the interpreter that makes .venv, TORCH the build: auto, cpu or cuda.
PYTHON ?= $(firstword $(shell command -v python3.11 2>/dev/null) $(shell command -v python3 2>/dev/null))
TORCH ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup test quickstart

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv from requirements.lock, and the software-GL libraries; quick when they are there
	@test -n "$(PYTHON)" || { echo "no python3.11 on the path: install Python 3.11 (Debian: apt-get install python3.11-venv)"; exit 1; }
	@"$(PYTHON)" tools/setup.py --torch $(TORCH)

test: setup  ## lint, check types, run the tests
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/python -m pytest

quickstart: setup  ## improve the warm-started tiny pi0 on LIBERO by RIPT; table, curve and video at the end
	.venv/bin/python 09_train_with_config.py --config_path configs/quickstart.yaml
