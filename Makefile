# make demo   prefill here, decode there, on the built-in model; writes demo.json and report.html
# make test   the whole test suite
# make check  lint, format, types, import rule, sizes
# make test-vllm  vLLM's CPU build in an environment of its own, real prefill and decode servers
# make test-vllm-faults  kill those servers in the middle of transfers, KILLS times each (20)
# make demo-vllm  two servers and a proxy, one prompt, and what it saved
# Each does all the set-up it needs in .venv; a second run reuses it.

PYTHON ?= python3
# Pinned, and a variable: name a CPU-only build, another version or a local wheel here.
TORCH ?= torch==2.13.0

# vLLM pins its own torch; about 3.5 GB.
VLLM_VENV ?= .venv-vllm
# Of each side; the rows of what came of it go to FAULTS, where that is set.
KILLS ?= 20
FAULTS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := .venv/set-up
TINY := $(shell find kvprism-tiny -type f -not -path '*/__pycache__/*' -not -path '*.egg-info/*')
KERNELS := hatch_build.py scripts/build-codec $(wildcard src/kvprism/codec/cpu*.[ch])

.PHONY: setup demo test check clean test-vllm test-vllm-faults demo-vllm

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/kvprism demo --json demo.json --report report.html

# The tests of a file share what they load, so files go whole to two processes, in their order: the
# longest are not among the last.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	scripts/check

test-vllm: $(STAMP) $(VLLM_VENV)/set-up
	KVPRISM_VLLM=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest tests/engine

test-vllm-faults: $(STAMP) $(VLLM_VENV)/set-up
	KVPRISM_VLLM=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python scripts/vllm-faults \
		--kills $(KILLS) $(if $(FAULTS),--json $(FAULTS))

demo-vllm: $(STAMP) $(VLLM_VENV)/set-up
	KVPRISM_VLLM=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python scripts/demo-vllm

$(VLLM_VENV)/set-up: scripts/set-up-vllm pyproject.toml $(KERNELS)
	PYTHON=$(PYTHON) scripts/set-up-vllm $(VLLM_VENV)

clean:
	rm -rf .venv $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
	rm -f demo.json report.html

# torch goes first, and its pin is repeated, so that no later requirement can replace it.
# kvprism-tiny comes from this repository: named beside the package, no index is asked for it.
# Installing kvprism compiles the codec's kernels, so their source is a reason to install again.
$(STAMP): pyproject.toml $(TINY) scripts/requirements $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("kvprism needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	@test -x $(BIN)/pip || { echo "==> creating .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "==> installing $(TORCH) (the largest download; once)"
	@$(PIP) "$(TORCH)"
	@echo "==> installing kvprism, kvprism-tiny and the test and lint tools"
	@$(BIN)/python scripts/requirements test lint > .venv/requirements.txt
	@$(PIP) "$(TORCH)" --editable '.[demo,eval]' ./kvprism-tiny --requirement .venv/requirements.txt
	@touch $@
	@echo "==> set-up complete"
