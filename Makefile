# make demo: set up and train LoLA-SpecViT on Indian Pines. make test: set up and run the tests.
PYTHON ?= python3
RUN := .venv/bin/python
# as many processes as there are cores, at most four, each with one thread: most tests are too small for more
SPREAD := -n logical --maxprocesses 4 --dist loadfile

.PHONY: demo test test-slow coverage lint benchmark

demo: .venv/installed
	$(RUN) train.py experiment=indian_pines

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(SPREAD)

test-slow: .venv/installed-dev
	$(RUN) -m pytest -m slow

# the share of branches that the tests take; fails below the floor in pyproject.toml
coverage: .venv/installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(SPREAD) --cov

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

benchmark: .venv/installed
	$(RUN) -m benchmarks.lola_specvit
	$(RUN) -m benchmarks.less_attention
	$(RUN) -m benchmarks.composer

.venv/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("Python %d.%d found, 3.11 or newer needed: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
