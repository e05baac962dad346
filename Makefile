# Every ritual is a command. `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
VENV := .venv
PY := $(VENV)/bin/python
LAYERS := platform ingestion training perturbation serving

# Options of `make demo`: ATLAS= takes paths, globs or s3:// addresses (several: separated by
# spaces), VOCABULARY= one of them; WORK= is the only folder it writes to. More options: ARGS="--local --fresh".
ATLAS ?=
VOCABULARY ?=
WORK ?= genescale-work
ARGS ?=

.PHONY: help demo test test-all check infra-check bench types clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo:  ## install, then run the whole way once and write a report
	@infra/setup all
	@$(VENV)/bin/genescale demo --work "$(WORK)" $(foreach file,$(ATLAS),--atlas '$(file)') $(if $(VOCABULARY),--vocabulary "$(VOCABULARY)") $(ARGS)

test:  ## install with test tools, then run the tests (under 20 minutes on 2 cores)
	@infra/setup dev
	@$(PY) -m pytest -m "not slow" $(ARGS)

test-all:  ## all tests, the slow ones too
	@infra/setup dev
	@$(PY) -m pytest $(ARGS)

check: types  ## lint, format, types and house rules
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@MYPYPATH=build/types $(VENV)/bin/mypy -p genescale
	@$(PY) -m pytest -q tests/house

# mypy does not follow an editable install: it reads the five folders through links that spell the package's name.
types:
	@infra/setup dev
	@mkdir -p build/types/genescale
	@for layer in $(LAYERS); do ln -sfn "$(CURDIR)/$$layer" "build/types/genescale/$$layer"; done
	@ln -sfn "$(CURDIR)/serving/client" build/types/genescale/client

infra-check:  ## render and check the Kubernetes manifests (needs kubectl, no cluster)
	@infra/setup dev
	@$(PY) -m pytest -q tests/infra

bench:  ## run a benchmark: make bench NAME=ingest
	@infra/setup dev
	@test -n "$(NAME)" || { echo "say which one: make bench NAME=$$(ls benchmarks/*.py 2>/dev/null | xargs -rn1 basename -s .py | paste -sd'|')"; exit 2; }
	@$(PY) benchmarks/$(NAME).py $(ARGS)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
