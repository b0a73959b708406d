# make demo   the main job on this machine: a simulated Spark, site.yml, a verified endpoint, a report
# make test   lint, unit tests and Molecule scenarios; needs no Spark and no GPU
# make help   everything else

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
# Ansible refuses a locale that is not UTF-8.
export LC_ALL := C.UTF-8
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Molecule scenarios in the order of a run; `default` is the whole recipe.
SCENARIOS ?= spark_host runtime_image model_fetch vllm_patches watchdog reap_service verify default

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set-up -----------------------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python $$($(PYTHON) -V | cut -d' ' -f2) found, 3.11 or later wanted: set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || .ci/as-root apt-get install -y -q python3-venv
	$(PYTHON) -m venv $(VENV)

$(VENV)/.controller: requirements/controller.txt | $(VENV)/bin/python
	@echo "Installing Ansible (pinned, with hashes)"
	@$(BIN)/pip install -q --require-hashes -r requirements/controller.txt
	@touch $@

$(VENV)/.dev: requirements/dev.txt | $(VENV)/bin/python
	@echo "Installing the test tools (pinned, with hashes)"
	@$(BIN)/pip install -q --require-hashes -r requirements/dev.txt
	@touch $@ $(VENV)/.controller

.PHONY: venv
venv: $(VENV)/.controller ## Ansible in .venv

# --- a Spark ----------------------------------------------------------------------------------------------------

.PHONY: install
install: $(VENV)/.controller ## Run on the Spark itself: provision and verify this host
	$(BIN)/ansible-playbook -i inventories/local site.yml $(ARGS)

# --- a simulated Spark ------------------------------------------------------------------------------------------

.PHONY: demo
demo: $(VENV)/.controller ## The main job against a simulated Spark on this machine
	@$(BIN)/python -m sim.demo

.PHONY: demo-negative
demo-negative: $(VENV)/.controller ## The same with a model that cannot retrieve: verification must fail
	@$(BIN)/python -m sim.demo --host spark-negative --model sim/no-needle --expect-failure

.PHONY: verify-long
verify-long: $(VENV)/.controller ## The whole verification of the demo's Spark up to 30,000 tokens, with a heat map: 15 to 30 minutes
	$(BIN)/ansible-playbook -i inventories/sim -l spark-sim playbooks/bench.yml -e verify_suite=grid \
	  -e '{"verify_needle_tokens": 30000, "verify_lengths": [8000, 16000, 30000]}'

.PHONY: bench-rates
bench-rates: ## The verification's rates against `vllm bench serve` on the demo's Spark: about 2 minutes
	@$(BIN)/python tests/benchmarks/verify_rates_demo.py

.PHONY: demo-down
demo-down: ## Remove every container, volume, process and network of the simulated Spark
	@if [ -e .cache/sim ]; then $(PYTHON) -m sim down --all; fi
	@if [ -e .cache/aarch64 ]; then $(PYTHON) -m sim.aarch64 down --all; fi

.PHONY: clean
clean: ## demo-down, and remove the caches, the evidence and .venv too
	@$(PYTHON) -m sim clean
	@if [ -e .cache/aarch64 ]; then $(PYTHON) -m sim.aarch64 clean; fi
	@rm -rf $(VENV) artifacts .mypy_cache .ruff_cache .pytest_cache .hypothesis .ansible

# --- tests ------------------------------------------------------------------------------------------------------

.PHONY: test
test: $(VENV)/.dev ## Lint, unit tests, and a Molecule scenario for each role and the whole recipe
	@.ci/test

.PHONY: lint
lint: $(VENV)/.dev ## ansible-lint (production), yamllint, ruff, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/yamllint --strict .
	$(BIN)/ansible-lint --offline -q

.PHONY: unit
unit: $(VENV)/.dev ## Unit tests
	$(BIN)/pytest -q

.PHONY: molecule
molecule: $(VENV)/.dev ## Molecule scenarios: SCENARIOS="spark_host verify" for some of them
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; for scenario in $(SCENARIOS); do molecule test -s $$scenario || exit 1; done

.PHONY: test-fleet
test-fleet: $(VENV)/.dev ## Several simulated Sparks: groups, batches and failures; one model that they take from each other
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; molecule test -s fleet && molecule test -s model_fleet

.PHONY: test-faults
test-faults: $(VENV)/.dev ## Faults of the service on a simulated Spark with the real vLLM: killed processes, wedges, sheds
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; molecule test -s service_faults

.PHONY: test-releases
test-releases: $(VENV)/.dev ## Patches against every published vLLM from 0.20.0 to 0.33.0 and FlashInfer
	$(BIN)/pytest -q tests/releases

# --- an emulated Spark ------------------------------------------------------------------------------------------

.PHONY: test-aarch64
test-aarch64: $(VENV)/.controller ## The recipe on emulated aarch64 Sparks with 122 GB: 40 minutes; STAGES="preflight memory", STRATEGY=mitogen
	@$(BIN)/python -m tests.aarch64.run --strategy $(or $(STRATEGY),linear) $(STAGES)

# --- a CUDA GPU -------------------------------------------------------------------------------------------------

.PHONY: gpu-proof-fetch
gpu-proof-fetch: $(VENV)/.controller ## Fetch the published kernel library for gpu-proof (37 MB)
	$(BIN)/python -m tests.gpu.router_kernel fetch

.PHONY: gpu-proof
gpu-proof: ## The router patch against vLLM's compiled kernel; PYTHON must have a torch that sees a GPU
	$(PYTHON) -m tests.gpu.router_kernel run --out artifacts/gpu-proof

.PHONY: gpu-proof-full-fetch
gpu-proof-full-fetch: $(VENV)/.controller ## Fetch vLLM 0.22.0 and what it needs for gpu-proof-full (1 GB)
	$(BIN)/python -m tests.gpu.full_server fetch

.PHONY: gpu-proof-full
gpu-proof-full: ## A whole vLLM with K144's geometry on a GPU of 120 GB; PYTHON as in gpu-proof
	$(PYTHON) -m tests.gpu.full_server run --out artifacts/gpu-proof-full

# --- upkeep -----------------------------------------------------------------------------------------------------

.PHONY: docs
docs: $(VENV)/.controller ## Write docs/variables.md from the argument specs
	$(BIN)/python tools/variables.py

.PHONY: lock
lock: ## Pin the requirements again (needs uv); nothing else changes versions
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header -q requirements/controller.in -o requirements/controller.txt
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header -q requirements/dev.in -o requirements/dev.txt
