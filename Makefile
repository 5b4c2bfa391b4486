# Each target sets up what it needs, with nothing but git, make and python3.
#
#   PYTHON=python3.12   another interpreter
#   JAX=0.11.2          that version of JAX, not the newest for the interpreter

PYTHON ?= python3
JAX ?=
ARGS ?=

version := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv/$(version)$(if $(JAX),-jax$(JAX))
bin := $(VENV)/bin
aot_bin := $(VENV)-aot/bin
gpu := $(shell command -v nvidia-smi)
# Compiling for the CPU is most of what tests do; none asks how fast the result is. The emitters of
# fusions take half of what is left; JAX 0.12 has no others.
COMPILE_FAST := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0 \
  --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
pin := $(if $(JAX),"jax==$(JAX)")

.DEFAULT_GOAL := help
.PHONY: help demo test hf lint aot shown bench wheel clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

demo: $(VENV)/.demo  ## attention against the standard one, and a model that learns (2 minutes)
	$(bin)/python -m bench demo

test: $(VENV)/.test  ## all tests that need no GPU
	$(COMPILE_FAST) $(bin)/python -m pytest -n auto -m "not aot" $(ARGS)

hf: $(VENV)/.hf  ## the models of the bench against Hugging Face's, which need torch
	$(bin)/python -m pytest tests/test_huggingface.py $(ARGS)

lint: $(VENV)/.lint  ## ruff (check, format) and mypy
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

aot: $(VENV)-aot/.aot  ## compile for GPUs that are not here: registers, spills, memory
	JAX_PLATFORMS=cpu $(aot_bin)/python -m pytest -n auto -m aot $(ARGS)

shown: $(VENV)-aot/.aot  ## the same as a table
	JAX_PLATFORMS=cpu $(aot_bin)/python -m bench aot --gpu h100 $(ARGS)

bench: $(VENV)/.test  ## python -m bench, with ARGS="speed" and the like
	$(bin)/python -m bench $(ARGS)

wheel: $(VENV)/.lint  ## build the wheel into dist/
	$(bin)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove the environments and caches
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One environment for each interpreter and JAX; a stamp says which extras it has.
$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml
	$(bin)/python -m pip install --quiet $(pin) -e ".$(if $(gpu),[cuda])"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(bin)/python -m pip install --quiet $(pin) -e ".[test,bench]"
	touch $@

$(VENV)/.hf: $(VENV)/.test
	$(bin)/python -m pip install --quiet $(pin) -e ".[test,bench,hf]"
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(bin)/python -m pip install --quiet $(pin) -e ".[test,bench,dev]"
	touch $@

# Apart, because a CUDA plugin without a GPU warns at every start. It must match JAX exactly.
$(VENV)-aot/.aot: pyproject.toml
	$(PYTHON) -m venv $(VENV)-aot
	$(aot_bin)/python -m pip install --quiet --upgrade pip
	$(aot_bin)/python -m pip install --quiet $(pin) -e ".[test,bench]"
	version=$$($(aot_bin)/python -c 'import jax; print(jax.__version__)') && \
	$(aot_bin)/python -m pip install --quiet -e ".[aot]" \
	  "jax==$$version" "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version"
	touch $@
