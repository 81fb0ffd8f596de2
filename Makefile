# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Resolved configs and versions that the checks run with; pyproject.toml holds the honest ranges.
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: help demo test test-slow lint types install chart-readme image-test clean

help:
	@echo "make demo       the whole way on embedded phantom data: scan ... pretrain ... predict (minutes, 2 cores)"
	@echo "make test       install and run the tests"
	@echo "make test-slow  the long tests too"
	@echo "make lint       ruff, and mypy --strict"
	@echo "make chart-readme  write the Helm chart's README from its values"
	@echo "make image-test    build the CPU image and try it (root, buildah, debootstrap; minutes)"
	@echo "make clean      remove the virtual environment and runs/demo"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing anycontrast with its training stack into $(VENV) ..."
	$(PIP) -e ".[train]"
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@echo "installing the test and lint tools into $(VENV) ..."
	$(PIP) -e ".[train,s3,bench,dev]"
	@touch $@

install: $(VENV)/.dev

demo: $(VENV)/.train
	$(BIN)/python recipes/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: $(VENV)/.dev
	$(BIN)/mypy

chart-readme: $(VENV)/.dev
	$(BIN)/python infra/chart_tools/readme.py

image-test:
	infra/docker/test_image.sh

clean:
	rm -rf $(VENV) runs/demo
