# `make` lists the targets. PYTHON picks the interpreter that makes .venv, TORCH the build: auto, cpu or cuda.
# ARGS goes to training and to pytest, for example ARGS="--override training.seed=1" or ARGS="-k model".
PYTHON ?= $(firstword $(shell command -v python3.11 2>/dev/null) $(shell command -v python3 2>/dev/null))
TORCH ?= auto
PYTHON312 ?= python3.12
NO_PYTHON = no python3.11 on the path: install Python 3.11 (Debian: apt-get install python3.11-venv)
SET_UP = test -n "$(PYTHON)" || { echo "$(NO_PYTHON)"; exit 1; }; "$(PYTHON)" tools/setup.py --torch $(TORCH)
LINT = .venv/bin/ruff check && .venv/bin/ruff format --check && .venv/bin/mypy
PYTEST = .venv/bin/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup setup-browser game libero-pro libero-plus peers qc openpi lerobot check test soak upstream quickstart quickstart-critic quickstart-game resume \
	resume-critic resume-game suites suite

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## install .venv from requirements.lock, and the software-GL libraries; quick if they are there
	@$(SET_UP)

# Only soak needs Chromium (a few hundred MB): its tests open the report in it.
setup-browser:
	@$(SET_UP) --browser

game: setup  ## install the emulator for pi0.parallel: stable-retro with Airstriker, whose ROM is for non-commercial use
	@$(SET_UP) --game

peers:  ## install .venv-peers from requirements-peers.lock: Stable-Baselines3 and Atari, for benchmarks/parallel.py
	@$(SET_UP) --torch cpu --peers

qc:  ## install .venv-qc from requirements-qc.lock: OGBench and what qc's code imports, for benchmarks/qc.py
	@$(SET_UP) --torch cpu --qc

# Only soak needs it: its tests run openpi's client and server against this project's.
openpi:
	@$(SET_UP) --torch cpu --openpi

# LeRobot asks for a torch of which the usual index has only builds with CUDA.
lerobot:  ## install .venv-lerobot from requirements-lerobot.lock, by Python 3.12: lerobot-eval with this engine (5 GB)
	@$(SET_UP) --torch cuda --lerobot "$(PYTHON312)"

libero-pro: setup  ## install LIBERO-PRO's changed tasks: evaluate --suite libero_pro/spatial_swap (6 MB)
	@$(SET_UP) --libero-pro

libero-plus: setup  ## install LIBERO-plus's variants of tasks: evaluate --suite libero_plus/spatial (25 MB)
	@$(SET_UP) --libero-plus

check: game libero-pro libero-plus  ## lint, check types, run the tests that start no process and simulate nothing
	$(LINT)
	$(PYTEST) -m "not engine and not runs and not soak" $(ARGS)

test: game libero-pro libero-plus  ## check, then the tests of the engine, of whole runs and of documented commands; CI runs it
	$(LINT)
	$(PYTEST) $(ARGS)

soak: setup-browser game libero-pro libero-plus openpi  ## run the long tests: many kills, hosts that die, every documented command, the report in a browser
	$(PYTEST) -m soak $(ARGS)

# An environment of its own, of 1.3 GB: openpi asks for other versions. The check computes on the CPU.
upstream:  ## install .venv-upstream from requirements-upstream.lock, and check that openpi's own code acts the same
	@$(SET_UP) --torch cpu --upstream
	.venv-upstream/bin/python tools/check_upstream.py

quickstart: setup  ## improve the warm-started tiny pi0 on LIBERO by RIPT; table, curve, video and report at the end
	.venv/bin/python 13_train_production_ready.py --config_path configs/quickstart.yaml $(ARGS)

resume: setup  ## resume an interrupted quickstart
	.venv/bin/python 13_train_production_ready.py --config_path configs/quickstart.yaml --resume $(ARGS)

# Starts for practice must half-work, so cloning ends at 0.6 on training states, or after a number of updates.
SUITES ?= spatial object goal 10
START_spatial = --demonstrations 50 --max-updates 3000 --score-every 600
START_object = --demonstrations 40 --max-updates 3600 --score-every 600
START_goal = --demonstrations 40 --action-noise 0.1 --max-updates 3600 --score-every 600
START_10 = --demonstrations 40 --action-noise 0.1 --max-updates 8000 --score-every 2000
suites: setup  ## make the starts of whole suites from nothing: scripted demonstrations, then cloning (a quarter of an hour to an hour each)
	$(foreach suite,$(SUITES),.venv/bin/python -m pi0.warmstart --suite libero_$(suite) --tasks $(START_$(suite)) --max-minutes 60 \
		--target-success 0.6 --score-episodes 60 --output checkpoints/suite_$(suite) &&) true

suite: setup  ## practise all ten tasks of a suite by RIPT, from a committed start: make suite SUITE=libero_goal
	@test -f configs/suite_$(SUITE:libero_%=%).yaml || { echo "name a suite that has a configs/suite_*.yaml: make suite SUITE=libero_goal"; exit 1; }
	.venv/bin/python 13_train_production_ready.py --config_path configs/suite_$(SUITE:libero_%=%).yaml $(ARGS)

quickstart-critic: setup  ## improve the same policy by ACRLPD: critics choose among its actions and teach it; table, films, report
	.venv/bin/python -m pi0.acrlpd.train --config acrlpd_quickstart $(ARGS)

resume-critic: setup  ## resume an interrupted quickstart-critic
	.venv/bin/python -m pi0.acrlpd.train --config acrlpd_quickstart --resume $(ARGS)

quickstart-game: game  ## train a policy for Airstriker by parallel PPO; table, curve, videos and report at the end
	.venv/bin/python -m pi0.parallel.train_parallel --config_path configs/parallel_quickstart.yaml $(ARGS)

resume-game: game  ## resume an interrupted quickstart-game
	.venv/bin/python -m pi0.parallel.train_parallel --config_path configs/parallel_quickstart.yaml --resume $(ARGS)
