# The verbs of this repository; `make` alone lists them. Everything is installed into .venv by the
# first verb that needs it, at the versions in constraints/cpu.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check -q
# A full install also serves the demo; only a bare machine takes the light one.
DEMO   := $(if $(wildcard $(VENV)/test.stamp),$(VENV)/test.stamp,$(VENV)/base.stamp)
SGLANG := sglang-0.5.23
INSTRUCTOR := instructor-1.17.0
FRONT  := __init__.py _version.py version.py utils.py lang benchmark srt/utils/network.py \
          srt/environ.py srt/parser srt/function_call srt/entrypoints/openai

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench kernels-compile docs clean

help: ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  make %-15s %s\n", $$1, $$2 }'

demo: $(DEMO) ## run a forking multi-turn program on the embedded model
	@$(BIN)/weft demo

test: $(VENV)/test.stamp $(VENV)/$(SGLANG).stamp $(VENV)/$(INSTRUCTOR).stamp ## run the fast tests (ARGS="-k cache" narrows)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not slow" $(ARGS)

test-slow: $(VENV)/test.stamp $(VENV)/$(SGLANG).stamp $(VENV)/$(INSTRUCTOR).stamp ## run the tests that take long
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m slow $(ARGS)

lint: $(VENV)/test.stamp .typing docs ## ruff, formatting, types, links
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/bench.stamp ## run every script in benchmarks/ that needs no GPU, each prints its own table
	@for script in $(filter-out %_gpu.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

kernels-compile: $(VENV)/test.stamp ## compile every kernel for sm_90a and sm_100a, and judge what came out
	$(BIN)/python benchmarks/kernels_compile.py

docs: ## check the links of every Markdown file
	$(PYTHON) docs/check_links.py

clean: ## remove what the other verbs made, .venv included
	rm -rf $(VENV) .typing .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that `python -m venv` writes, so a broken attempt is made again.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/base.stamp: pyproject.toml constraints/cpu.txt | $(BIN)/pip
	$(PIP) install -c constraints/cpu.txt -e .
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints/cpu.txt | $(BIN)/pip
	$(PIP) install -c constraints/cpu.txt -e '.[test,dev]'
	@touch $@

$(VENV)/bench.stamp: $(VENV)/test.stamp
	$(PIP) install -c constraints/cpu.txt -e '.[bench]'
	@touch $@

# The newest sglang, beside the pinned one, for tests that put it first on sys.path. Only what its
# front end and its load generator import is kept (2 of 222 MB); the rest needs a GPU stack.
$(VENV)/$(SGLANG).stamp: | $(BIN)/pip
	rm -rf $(VENV)/$(SGLANG) $(VENV)/sglang-full
	$(PIP) install --no-deps --no-compile --target $(VENV)/sglang-full $(subst -,==,$(SGLANG))
	mkdir -p $(VENV)/$(SGLANG)
	tar -C $(VENV)/sglang-full -cf - $(addprefix sglang/,$(FRONT)) | tar -C $(VENV)/$(SGLANG) -xf -
	rm -rf $(VENV)/sglang-full
	@touch $@

# Beside the others too: it asks for a jiter that the pinned openai does not take.
$(VENV)/$(INSTRUCTOR).stamp: | $(BIN)/pip
	$(PIP) install --no-deps --no-compile --target $(VENV)/$(INSTRUCTOR) $(subst -,==,$(INSTRUCTOR))
	@touch $@

# mypy cannot see packages behind an import hook, so it reads this farm of links to the folders.
# It also runs the code where nothing is installed: PYTHONPATH=.typing python -m weft.gateway.cli
.typing:
	mkdir -p .typing/weft
	for folder in backend gateway kernels programs runtime; do \
	    ln -sfn ../../$$folder .typing/weft/$$folder; done
