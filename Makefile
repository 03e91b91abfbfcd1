# One line of help stands behind each target; `make help` prints them.
SHELL := /bin/bash
VENV := .venv/bin
BOOT := $(or $(PYTHON),python3)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-vllm vllm-environment lint bench bench-learning bench-fine-tuning bench-prompts compatibility clean

help: ## show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: ## make .venv with everything the demo and the tests need (PYTHON=... picks the interpreter)
	@$(BOOT) scripts/setup.py

demo: setup ## train a small text-to-SQL agent on this machine (STEPS=n for a shorter run)
	@$(VENV)/python -m examples.text_to_sql.train $(if $(STEPS),--steps $(STEPS))

test: ## run everything: environment, lint and types, unit tests, integration tests
	@$(BOOT) scripts/stages.py test

vllm-environment: setup ## make an environment with vLLM for the CPU in build/environments (half a gigabyte to fetch)
	@$(VENV)/python scripts/environments.py --vllm

test-vllm: vllm-environment ## run every test with real vLLM servers and print what was compared
	@$(VENV)/python -m pytest integration_tests/vllm

lint: setup ## check style and types
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check --quiet . || { echo "run: $(VENV)/ruff format ."; exit 1; }
	@$(VENV)/mypy

bench: setup ## measure the demo
	@$(VENV)/python -m benchmarks.demo

bench-learning: setup ## measure the learning core: tables and pictures in benchmarks/results/
	@$(VENV)/python -m benchmarks.learning

bench-fine-tuning: setup ## measure SFT and then RL against RL alone: table and picture in benchmarks/results/
	@$(VENV)/python -m benchmarks.fine_tuning

bench-prompts: setup ## measure searches for prompts beside Agent Lightning's: table and picture in benchmarks/results/
	@$(VENV)/python -m benchmarks.prompts

compatibility: setup ## run every framework against the gateway and write docs/compatibility.*
	@$(VENV)/python scripts/compatibility.py

clean: ## delete the environment, caches and build outputs; runs/ stays
	@rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
