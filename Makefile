# Everything runs in .venv, which is built from requirements.txt (what the project uses) and constraints.txt (the versions
# of what that needs in turn), and brought up to date when either changes.
# All paths are relative, so the folder may have a space in its path.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV_PYTHON := .venv/bin/python
STAMP := .venv/installed-$(shell cat requirements.txt constraints.txt | cksum | cut -d ' ' -f 1)
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --progress-bar off -c constraints.txt
STEPS := awk '/^(Collecting|Downloading|Installing|Successfully)/ { print "  " substr($$0, 1, 110); fflush() }'

.PHONY: help setup run test lint bench

help:
	@echo "make setup   build .venv from requirements.txt (run and test do this too)"
	@echo "make run     distil the default teacher and write a report; flags: make run ARGS='--seed 3'"
	@echo "make test    lint, then run the tests; flags: make test ARGS='-k ngram'"
	@echo "make lint    ruff, pyright and import-linter"
	@echo "make bench   run every script in benchmarks/"

setup: $(STAMP)

# Without a stamp every step is taken again; pip skips what an interrupted install had finished.
$(STAMP):
	@recent='import sys, venv; sys.exit(sys.version_info < (3, 11))'; \
	for python in python3.11 python3 python; do \
	  if "$$python" -c "$$recent" >/dev/null 2>&1; then break; fi; \
	  python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "Python 3.11 or newer is needed, and neither python3.11 nor python3 is one." >&2; exit 1; \
	fi; \
	if ! $(VENV_PYTHON) -c "import pip; $$recent" >/dev/null 2>&1; then \
	  echo "Making .venv with $$($$python --version)"; \
	  "$$python" -m venv --clear .venv; \
	fi
	@echo "Installing torch, first so that no later package pulls another build of it (a few minutes)"
	@$(INSTALL) "$$(grep '^torch==' requirements.txt)" | $(STEPS)
	@echo "Installing the other packages of requirements.txt (a few minutes)"
	@$(INSTALL) -r requirements.txt | $(STEPS)
	@echo "Checking torchvision and torchaudio against this build of torch"
	@for package in torchvision torchaudio; do \
	  if ! $(VENV_PYTHON) -c "import $$package" >/dev/null 2>&1; then \
	    echo "Removing $$package: it is built for another torch, importing transformers would fail on it, and nothing here needs it"; \
	    $(PIP) uninstall --quiet --yes $$package; \
	  fi; \
	done
	@rm -f .venv/installed-*
	@touch $(STAMP)

run: setup
	@$(VENV_PYTHON) experiments/v11_1.py $(ARGS)

# One thread: the tests are many small products, and a second thread would mostly wait.
test: lint
	@echo "Testing"
	@PYTHONUTF8=1 OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest $(ARGS)

lint: setup
	@echo "Linting: ruff, pyright, import-linter"
	@$(VENV_PYTHON) -m ruff check --quiet .
	@$(VENV_PYTHON) -m pyright
	@$(VENV_PYTHON) -c 'from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_logo=True))'

bench: setup
	@for claim in lif count wkv7 linear_divergence student_step teacher_targets topk_targets operation_counts busy_core quality gpu; do $(VENV_PYTHON) -m benchmarks.$$claim; done
