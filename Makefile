# make demo   trains the network of examples/digits_lightning.py, plain and with a rule, and draws one of its kernels
# make test   runs the tests
# make check  runs lint, types, the site and the tests: all that a change must pass
# make docs   builds the site in docs/_build/html; a warning is an error
# make bench  measures what freezing costs, against plain training and other ways to do it (some minutes)
# make hooks  has git run the quick checks before each commit
# make wheel  builds what a release uploads, and checks what it holds
# make test-wheel   runs the tests on the built wheel outside this folder, with no extra and then with all
# make test-lowest  runs them on the oldest torch that is supported (its download is of gigabytes)
# make test-frameworks  runs the tests of large frameworks, such as TRL and Keras (a download of gigabytes)
# make test-versions  runs the core tests on five releases of torch, one after the other (as many downloads of gigabytes)
#
# Each makes the virtual environment it needs; the second time it is there already.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= logical
RUN := $(VENV)/bin/
INSTALL := $(RUN)python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU := https://download.pytorch.org/whl/cpu

.PHONY: demo test coverage lint types check docs bench hooks wheel test-wheel test-lowest test-frameworks test-versions clean

demo: $(VENV)/.demo
	$(RUN)python examples/digits_lightning.py

test: $(VENV)/.test
	$(RUN)python -m pytest --numprocesses=$(WORKERS) --maxprocesses=8 --dist=loadgroup

lint: $(VENV)/.test
	$(RUN)ruff check .
	$(RUN)ruff format --check .

types: $(VENV)/.test
	$(RUN)mypy

check: lint types docs test

coverage: $(VENV)/.test
	$(RUN)python -m pytest --cov

docs: $(VENV)/.docs
	$(RUN)python -m sphinx -W --keep-going -n --quiet docs docs/_build/html
	@echo "the site: docs/_build/html/index.html"

bench: $(VENV)/.bench
	$(RUN)python -m benchmarks

hooks: $(VENV)/.release
	$(RUN)pre-commit install

wheel: $(VENV)/.release
	rm -rf build dist
	$(RUN)python -m build
	$(RUN)twine check --strict dist/*
	$(RUN)python -m tools.check_dist

test-wheel: wheel
	$(RUN)python -m tools.run_on_wheel --extras none
	$(RUN)python -m tools.run_on_wheel --extras all

test-lowest: wheel
	$(RUN)python -m tools.run_on_wheel --constraint constraints-lowest.txt

test-frameworks: | $(VENV)/bin/python
	$(RUN)python -m tools.run_with_frameworks

test-versions: | $(VENV)/bin/python
	$(RUN)python -m tools.run_on_torch $(RELEASES)

$(VENV)/.release: constraints.txt | $(VENV)/bin/python
	$(INSTALL) build twine pre-commit
	@touch $@

# The demo runs on the CPU. The usual torch for Linux brings CUDA along, a download of gigabytes that would not be used.
$(VENV)/.demo: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(RUN)python -c "import torch" 2>/dev/null || { \
		echo "downloading torch for the CPU (190 MB)"; \
		$(INSTALL) --retries 0 --extra-index-url $(TORCH_CPU) "torch==$(TORCH)+cpu" 2>/dev/null || \
		echo "found no torch for the CPU alone: the next step downloads the usual one, with CUDA about 3 GB"; }
	@echo "downloading Lightning, matplotlib and scikit-learn (100 MB)"
	$(INSTALL) --editable ".[demo]"
	@touch $@

# A stamp for each set of dependencies, renewed when what it is made from changes.
$(VENV)/.test $(VENV)/.docs $(VENV)/.bench: $(VENV)/.%: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing what \`$*\` in setup.cfg names; with torch for CUDA this downloads about 3 GB"
	$(INSTALL) --editable ".[$*]"
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage checkpoints lightning_logs outputs docs/_build
