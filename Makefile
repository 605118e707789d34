# Every target sets itself up: an own .venv with the locked versions, made anew only when the lock changes.
#   make help | make demo | make test          make demo DEVICE=cuda          make test PYTHON=python3.12

.DEFAULT_GOAL := help
SHELL := /bin/bash
DEVICE ?= cpu
ARGS ?=
PEER ?=
TE ?=
RESULTS ?= runs/bench
VENV := .venv
PY := $(VENV)/bin/python
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
  $$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)
LOCK := requirements/cpu.txt
STAMP := $(VENV)/ready-$(shell cat $(LOCK) pyproject.toml setup.py | sha256sum | cut -c1-16)
CONSTRAINTS := requirements/gpu-constraints.txt
TE_STAMP := $(VENV)/te-$(shell cat $(LOCK) $(CONSTRAINTS) pyproject.toml | sha256sum | cut -c1-16)

# A run on CPU sees no GPU; OMP_NUM_THREADS=1 keeps tests that fork ranks from sharing a thread pool.
ifeq ($(DEVICE),cuda)
RUN := PYTHONUTF8=1
else ifeq ($(DEVICE),cpu)
RUN := CUDA_VISIBLE_DEVICES= PYTHONUTF8=1
else
$(error DEVICE=$(DEVICE): say DEVICE=cpu or DEVICE=cuda)
endif
ifeq ($(filter help clean,$(or $(MAKECMDGOALS),help)),)
ifeq ($(PYTHON),)
$(error no Python 3.11 or 3.12 found: install one, or name it with make ... PYTHON=/path/to/python3.11)
endif
endif
TEST := $(RUN) OMP_NUM_THREADS=1 $(PY)

.PHONY: help setup demo test test-long bench kernels gpu-check lint format lock wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## only the environment (.venv) that all the others use

$(STAMP): $(LOCK) pyproject.toml setup.py
	@echo "setting up $(VENV) with $(PYTHON): some minutes the first time, nothing when the lock has not changed"
	@$(PY) -c '$(SUPPORTED)' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/ready-* && touch $@

demo: $(STAMP)  ## raw text to an aligned model in minutes, with a report: runs/demo/report.html (DEVICE=cuda uses a GPU)
	@$(RUN) $(PY) tools/run_demo.py --device $(DEVICE) $(ARGS)

test: $(STAMP)  ## lint, types and every default test, in stages with their seconds (ARGS="--only unit,ranks")
	@$(TEST) tools/run_tests.py $(ARGS)

test-long: $(STAMP)  ## the long forms: kill campaigns, seeds, the whole layout matrix, other Tritons
	@$(TEST) tools/run_tests.py --long $(ARGS)

bench: $(STAMP)  ## side by side: step, generation, PPO; packing and TRL's PPO too with PEER=PYTHON_WITH_TRL
	@mkdir -p $(RESULTS)
	@$(RUN) $(PY) tools/bench_step.py --out $(RESULTS)/step.json
	@$(RUN) $(PY) tools/bench_generate.py --to $(RESULTS)/generate.json
	@$(RUN) $(PY) tools/bench_ppo.py $(if $(PEER),--peer-python $(PEER)) --out $(RESULTS)/ppo.json
	@$(if $(PEER),$(RUN) $(PY) tools/bench_packing.py --peer-python $(PEER) --out $(RESULTS)/packing.json)

kernels: $(STAMP)  ## the kernels alone: references, and Triton where it can run
	@$(TEST) tools/run_tests.py --only kernels $(ARGS)

gpu-check: $(STAMP) $(if $(TE),$(TE_STAMP))  ## what needs GPUs, one or several; TE=1 adds Transformer Engine and requires it
	@PYTHONUTF8=1 $(if $(TE),MEGATRON_ZJ_REQUIRE_TE=1) $(PY) tools/run_tests.py --gpu $(ARGS)

# It compiles against the torch that is there: without isolation, with nvcc, for torch's CUDA, under the lock's versions.
$(TE_STAMP): $(STAMP) $(CONSTRAINTS)
	@echo "adding Transformer Engine to $(VENV): it is compiled, which needs the CUDA toolkit and takes many minutes"
	@cuda=$$($(PY) -c 'import sys, torch; print((torch.version.cuda or sys.exit("this torch is no CUDA build")).split(".")[0])') \
	  && $(PY) -m pip install --disable-pip-version-check --no-build-isolation -c $(LOCK) -c $(CONSTRAINTS) \
	    --editable '.[te]' "transformer-engine[core_cu$$cuda]"
	@rm -f $(VENV)/te-* && touch $@

lint: $(STAMP)  ## ruff and mypy
	@$(TEST) tools/run_tests.py --only ruff,mypy $(ARGS)

format: $(STAMP)  ## let ruff rewrite what it can
	@$(PY) -m ruff check --fix . ; $(PY) -m ruff format .

lock:  ## write requirements/cpu.txt anew from pyproject.toml (an empty environment; takes minutes)
	@PYTHON=$(PYTHON) tools/make_lock.sh $(LOCK)

wheel: $(STAMP)  ## dist/megatron_zj-*.whl
	@$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . && ls dist

clean:  ## remove the environment and what tools leave behind; runs/ stays
	@rm -rf $(VENV) .triton build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
