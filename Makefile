# Everything a person types. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?=
SEEDS ?= 200
FIRST ?= 1
MINUTES ?= 60
CASES ?= 1000

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast docs sim sim-nightly corruption crashpoints mutants lint format bench chaos soak proto check clean up-docker down-docker images images-local test-containers dist sbom test-install

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## create .venv with everything, and fetch an etcd server
	@PYTHON=$(PYTHON) VENV=$(VENV) tools/setup.sh

demo: setup ## train digits on 2 agents x 2 ranks while a leader, a rank and a machine are killed
	@$(BIN)/python -m examples.demo

test: setup ## run every test, with real etcd, S3, gloo and kills (about 20 minutes on 2 cores)
	@tools/test.sh

test-fast: setup ## unit, scenario and simulation tests only
	@$(BIN)/python -m pytest -q -n 2 tests/unit tests/scenarios tests/sim tests/security tests/mutants tests/test_architecture.py

docs: setup ## run every command of README.md and docs/ on a cluster, and compare what they print
	@$(BIN)/python -m pytest -q -p no:randomly tests/docs

sim: setup ## run the simulation: SEED=n replays one, SEEDS=n runs that many
	@$(BIN)/python -m tests.sim $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

mutants: setup ## apply each deliberate bug and see a test catch it: ONLY="id ..." picks some
	@$(BIN)/python -m tests.mutants $(if $(ONLY),--only $(ONLY),)

corruption: setup ## damage committed checkpoints in CASES=1000 ways; SEED=n draws others
	@$(BIN)/python -m tests.corruption --cases $(CASES) $(if $(SEED),--seed $(SEED),)

crashpoints: setup ## die at every call by which a checkpoint is saved, committed, retired and collected
	@$(BIN)/python -m tests.crashpoints --all

sim-nightly: setup ## simulate many seeds on all cores: SEEDS=20000 FIRST=1; failures are shrunk into .cache/sim
	@$(BIN)/python -m tests.sim --seeds $(SEEDS) --first $(FIRST) --jobs $$(nproc) --folder .cache/sim --failures 20

lint: setup ## ruff, mypy --strict, import contracts, freshness of generated code
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports && tools/gen_proto.sh --check

format: setup ## format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

check: lint test ## what CI runs

bench: setup ## measure recovery and overhead beside torchrun; writes benchmarks/results.jsonl
	@$(BIN)/python -m benchmarks

chaos: setup ## 100 random faults in one run: SEED=n replays one
	@$(BIN)/python -m tests.e2e.chaos $(if $(SEED),--seed $(SEED),)

soak: setup ## MINUTES=60 of random faults: nothing breaks, nothing is left behind, nothing grows
	@$(BIN)/python -m tests.e2e.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED),)

images: setup ## build dtrain's images on public bases: PYTHON_IMAGE=... TORCH_IMAGE=... TAG=... choose others
	@deploy/docker/build.sh

images-local: setup ## build all images that tests and up-docker need, without any registry
	@deploy/docker/build-local.sh

test-containers: setup ## failover tests in containers; starts an engine if none answers: SUBSET=1 runs CI's part
	@tools/test-containers.sh $(if $(SUBSET),--subset)

up-docker: ## a whole cluster in containers: AGENTS=2..8 SECURE=1 MONITORING=1 IMAGES=local
	@deploy/compose/up.sh $(if $(AGENTS),--agents $(AGENTS)) $(if $(SECURE),--secure) $(if $(MONITORING),--monitoring) $(if $(filter local,$(IMAGES)),--local-images)

down-docker: ## take it down; it asks about the volumes: VOLUMES=1 removes them, VOLUMES=0 keeps them
	@deploy/compose/down.sh $(if $(filter 0,$(VOLUMES)),--keep-volumes,$(if $(VOLUMES),--volumes))

dist: setup ## build sdist and wheel into dist/, reproducibly, with SHA256SUMS
	@$(BIN)/python -m tools.dist

test-install: dist ## install the wheel into a clean environment per extra and try it: EXTRAS="none s3"
	@$(BIN)/python -m tools.test_install $(EXTRAS)

sbom: dist ## bills of materials (CycloneDX) of the wheel, one per extra, beside it
	@$(BIN)/python -m tools.sbom $(EXTRAS)

proto: ## regenerate the protobuf code
	@tools/gen_proto.sh

clean: ## remove the environment, caches and local clusters
	rm -rf $(VENV) .cache .demo .mypy_cache .ruff_cache .pytest_cache
