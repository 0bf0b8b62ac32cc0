# make demo   trains the network of examples/digits_lightning.py and draws its kernels
# make test   runs the tests
# make check  runs lint, types and tests: all that a change must pass
# make bench  measures what freezing costs, against plain training and other ways to do it (some minutes)
#
# Each makes the virtual environment it needs; the second time it is there already.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/
INSTALL := $(RUN)python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test coverage lint types check bench clean

demo: $(VENV)/.examples
	$(RUN)python examples/digits_lightning.py

test: $(VENV)/.test
	$(RUN)python -m pytest

lint: $(VENV)/.test
	$(RUN)ruff check .
	$(RUN)ruff format --check .

types: $(VENV)/.test
	$(RUN)mypy

check: lint types test

coverage: $(VENV)/.test
	$(RUN)python -m pytest --cov

bench: $(VENV)/.bench
	$(RUN)python -m benchmarks

# A stamp for each set of dependencies, renewed when what it is made from changes.
$(VENV)/.examples $(VENV)/.test $(VENV)/.bench: $(VENV)/.%: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[$*]"
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage checkpoints lightning_logs outputs
