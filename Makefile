# `make` alone lists what there is. Python 3.11 or newer and make are all that must be there before.
PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/ready

.DEFAULT_GOAL := help
.PHONY: help book test drawn check lint types quick format slurm notebooks serve bench clean

help:  ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: $(READY)  ## Execute every chapter and render _build/html/index.html
	-@$(BIN)/imsvd data get cifar10
	$(BIN)/jupyter-book build book --config _config.yml --toc $(CURDIR)/_toc.yml --path-output . -W -n --keep-going
	@echo _build/html/index.html

test: $(READY)  ## Test the package, every chapter as a notebook, and the rendered pages
	@status=0; \
	$(BIN)/python book/_ext/notebooks.py build/smoke --execute || status=1; \
	OMP_NUM_THREADS=1 IMSVD_BOOK=build/smoke $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slurm" || status=1; \
	exit $$status

drawn: $(READY)  ## Execute the chapters on the drawn data and test what they say there; `make test` then reads both
	IMSVD_DATASET=attributes $(BIN)/python book/_ext/notebooks.py build/drawn --execute
	$(BIN)/python -m pytest -q tests/book/test_sentences.py -k drawn

check: lint types quick  ## Lint, format, spelling, types and the quick tests: two minutes on two cores

lint: $(READY)  ## Of these, ruff, its formatter and codespell
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell

types: $(READY)  ## Of these, mypy
	$(BIN)/mypy

quick: $(READY)  ## Of these, the tests that are neither marked slow nor of the book
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal \
	  -m "not slow and not slurm and not book and not gpu"

format: $(READY)  ## Format all code, and mend what ruff can mend safely
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

slurm: $(READY)  ## Test launching on a real Slurm of two nodes, started for it; needs root and Slurm's packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests/slurm

notebooks: $(READY)  ## Write the chapters as Jupyter notebooks into _build/notebooks
	$(BIN)/python book/_ext/notebooks.py _build/notebooks

serve:  ## Serve the rendered book on http://127.0.0.1:8000
	$(PYTHON) -m http.server 8000 --bind 127.0.0.1 --directory _build/html

bench: $(READY)  ## Time the package against textbook versions and peers
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## Remove everything built (the environment stays; remove .venv by hand)
	rm -rf _build build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The environment, made again only when what it is made from has changed.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "This book needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making the environment .venv"; $(PYTHON) -m venv .venv; }
	@echo "Installing the pinned requirements; the first time this takes minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
