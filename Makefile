# Every target builds what it needs. The machine needs only Python 3.11 or newer and a package index.
#
#   make demo     run the whole pipeline on the embedded model: zero-shot, SaHa, fine-tuning, and a report
#   make test     check format, lint and types, then run the tests, two files at a time; .ci/run calls this
#   make docs     build the documentation site into build/docs, strictly and offline; open build/docs/index.html
#   make lint     check format, lint and types only
#   make format   let ruff rewrite what it can
#   make clean    remove the environment and all caches
#
# PYTHON=/path/to/python3.12 chooses the interpreter, VENV=dir chooses the folder of the environment, and ARGS='...' is
# passed to the demo or to pytest. If an index offers a CPU build of torch, name it in PIP_EXTRA_INDEX_URL or
# PIP_FIND_LINKS: pip prefers a local build of the pinned version.

VENV ?= .venv
ARGS ?=
PACKAGES := gen2embed_mteb trainers vlm2vec_adapter _gen2embed_hook.py

BIN := $(VENV)/bin
LOWEST := $(VENV)-lowest
READY := $(VENV)/.ready
# -qq makes pip silent unless something fails.
PIP := $(BIN)/python -m pip install -qq -c constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tree has all that the demo and the tests need: a look-up on a model hub would be a mistake, so it must fail.
demo test: export HF_HUB_OFFLINE := 1

.PHONY: demo test test-fast test-lowest docs lint format clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/gen2embed demo $(ARGS)

test: lint
	$(BIN)/python $(PYTEST) $(ARGS)

test-fast: lint
	$(BIN)/python $(PYTEST) -m 'not slow' $(ARGS)

test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python $(PYTEST) $(ARGS)

# Warnings are errors. Nothing is downloaded: no font, no inventory, and HF_HUB_OFFLINE forbids model look-ups.
docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --clean

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# 3.11 comes first because constraints.txt was tested on it. A candidate must run, not only exist: version managers
# leave names on the path that only print an error.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "Creating $(VENV) with $$("$$python" --version) ($$python)"; \
	    exec "$$python" -m venv "$(VENV)"; \
	  fi; \
	done; \
	echo "error: Python >= 3.11 with its venv and ensurepip modules is needed; none of these is one:" >&2; \
	echo "       $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)" >&2; \
	echo "       Install one (Debian, Ubuntu: apt install python3-venv), or run make PYTHON=/path/to/python3" >&2; \
	exit 1

# torch is installed first: it is by far the largest, and if the installation stops later, it need not be fetched again.
# Its version is written here as well as in constraints.txt, since a range alone would fetch gigabytes of another build.
# The build backend comes from constraints.txt too, hence no build isolation. The start-up hook is copied when the
# package is installed, so a change to it needs another installation.
$(READY): pyproject.toml constraints.txt gen2embed_hook.pth | $(BIN)/python
	@echo "Installing into $(VENV) (some minutes the first time)"
	@$(PIP) torch==2.13.0 hatchling
	@$(PIP) --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.docs-ready: $(READY)
	@$(PIP) --no-build-isolation -e '.[docs]'
	@touch $@

$(LOWEST)/.ready: pyproject.toml tests/helpers/lowest.py gen2embed_hook.pth | $(BIN)/python
	@echo "Installing the lowest versions into $(LOWEST) (some minutes the first time)"
	@$(BIN)/python -m venv $(LOWEST)
	@$(BIN)/python tests/helpers/lowest.py >$(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python -m pip install -qq -c $(LOWEST)/lowest.txt torch==2.13.0 hatchling
	@$(LOWEST)/bin/python -m pip install -qq -c $(LOWEST)/lowest.txt --no-build-isolation -e '.[test]'
	@touch $@
