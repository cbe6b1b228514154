# From a fresh machine to a demo or a test run. Needs Python 3.11 or newer with venv, and PyPI; everything else lands in $(VENV).
#
#   PY=python3.12     another interpreter
#   VENV=/some/venv   another virtual environment (one that exists is used as it is, and installed into)
#   TORCH="..."       what pip is told for PyTorch, a CPU-only index for instance:
#                     TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#   PEERS=/some/dir   where `bench-peers` sets up vLLM, llama.cpp and transformers serve (5 GB), and finds them again
#   JOBS=2            processes that `test` shares the tests between, a file at a time (each takes some 3 GB; 0: none but the first)
#   ARGS="..."        more options for `demo`, `test`, `check-slow`, `check-attack`, `bench`, `bench-peers` and `paper-figures`

PY    ?= python3
VENV  ?= .venv
TORCH ?= torch==2.13.0
PEERS ?= .peers
JOBS  ?= 2
ARGS  ?=
# Tiers too small for all six conversations, so that chunks are copied down, swapped in, dropped and recomputed before your eyes.
DEMO  := --users 6 --turns 8 --gpu-cache 0.09 --cpu-cache 0.02

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
PROJECT := pyproject.toml setup.py constraints.txt src/pensieve/__init__.py $(wildcard src/pensieve/worker/kernel/*)
KERNEL_TESTS := $(addprefix tests/,worker/test_triton.py worker/test_compiled_kernels.py worker/test_device_rows.py worker/test_flashinfer.py worker/test_cuda.py engine/test_ahead.py)
TREES   := $(wildcard src tests scripts benchmarks main.py setup.py docs/conf.py)

.DEFAULT_GOAL := help
.PHONY: help demo test check-slow check-soak check-kernels check-page check-clients check-gguf check-attack bench bench-server bench-peers paper-figures docs dist lint format model clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1 \t/p' Makefile | expand -t 14

demo: $(VENV)/.ready model ## install, fetch the default model, then compare stateful with stateless on the shipped conversations
	$(BIN)/pensieve compare $(DEMO) $(ARGS)

test: lint model ## install, fetch the default model, lint, check types and imports, run the tests but the slow ones
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow and not browser and not kernels" $(ARGS)
	$(BIN)/python tests/check_tree.py

check-slow: $(VENV)/.dev-ready model ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

check-soak: $(VENV)/.dev-ready model ## the memory of a server after 10,000 turns, in every number type and with log-probabilities (an hour); the last line is JSON
	$(BIN)/python benchmarks/soak.py --logprobs $(ARGS)

check-kernels: $(VENV)/.dev-ready ## every variant of the GPU kernels: in Triton's interpreter (20 minutes), or on a GPU where there is one
	$(BIN)/python -m pytest $(KERNEL_TESTS) $(ARGS)

check-page: $(VENV)/.dev-ready model ## the page in a browser (Debian: apt install chromium fonts-dejavu-core)
	@test -x /usr/bin/chromium || { echo "the page's tests drive /usr/bin/chromium (on Debian: apt install chromium fonts-dejavu-core)" >&2; exit 1; }
	$(BIN)/python -m pytest -m browser $(ARGS)

check-clients: $(VENV)/.dev-ready model ## real OpenAI clients, each in an environment of its own, against a server
	$(BIN)/python tests/clients/run.py $(ARGS)

check-gguf: $(VENV)/.dev-ready ## GGUF files of every architecture that is read: as Pensieve, llama.cpp and the model they were made from compute them
	$(BIN)/python tests/llama_cpp/run.py $(ARGS)

check-attack: $(VENV)/.dev-ready model ## hostile and broken clients, disks, models and processes against real servers (half an hour; the last line is JSON)
	$(BIN)/python tests/attack/run.py $(ARGS)

bench: $(VENV)/.dev-ready model ## measure the engine; the last line is JSON
	$(BIN)/python benchmarks/engine.py $(ARGS)

bench-server: $(VENV)/.dev-ready model ## measure what HTTP costs; the last line is JSON
	$(BIN)/python benchmarks/server.py $(ARGS)

bench-peers: $(VENV)/.dev-ready model ## set up vLLM, llama.cpp and transformers serve, and measure Pensieve beside them (hours; ARGS=--quick: minutes)
	$(BIN)/python benchmarks/peers --peers $(PEERS) --torch "$(TORCH)" $(ARGS)

paper-figures: $(VENV)/.ready ## simulate the figures of the paper into figures/ (an hour of one core; ARGS="--figures 10a --out DIR")
	$(BIN)/python benchmarks/paper $(ARGS)

docs: $(VENV)/.docs-ready ## build the documentation as a site in out/docs; a dead link fails
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d out/docs-cache docs out/docs
	@echo "open out/docs/index.html"

dist: $(VENV)/.dist-ready ## build sdist and wheel in dist/, install the wheel into an empty environment and run it there
	$(BIN)/python tests/check_dist.py --dist dist --torch "$(TORCH)" $(ARGS)

lint: $(VENV)/.dev-ready ## style, format, types, which room imports which; no litter
	$(BIN)/python tests/check_tree.py
	$(BIN)/ruff check $(TREES)
	$(BIN)/ruff format --check $(TREES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev-ready ## put every file into the house's format
	$(BIN)/ruff format $(TREES)
	$(BIN)/ruff check --fix $(TREES)

model: $(VENV)/.ready # the default model into the user's cache; at once if it is there
	$(BIN)/python -m pensieve.worker.weights fetch

clean: ## remove caches and outputs, not the virtual environment
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find $(TREES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Pensieve needs Python 3.11 or newer; $(PY) is $$($(PY) --version 2>&1). Name another: make PY=python3.12 ..." >&2; exit 1; }
	$(PY) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "$(PY) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# PyTorch goes first and by exact version: left to the resolver, another build may be chosen.
$(VENV)/.ready: $(PROJECT) | $(BIN)/python
	$(BIN)/python -m pip --disable-pip-version-check install $(TORCH)
	$(PIP) -e ".[gguf,plot,baseline,server]"
	@touch $@

$(VENV)/.dev-ready: $(VENV)/.ready
	$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.docs-ready: $(VENV)/.ready
	$(PIP) -e ".[docs]"
	@touch $@

$(VENV)/.dist-ready: $(VENV)/.ready
	$(PIP) -e ".[dist]"
	@touch $@
