# Every target sets up what it needs in .venv; see `make help`.

PYTHON ?= python3
JOBS   ?= 2
ARGS   ?=
TORCH  ?= 2.13.0
DEMO   ?= build/demo

VENV  := .venv
BIN   := $(VENV)/bin
PY    := $(BIN)/python
READY := $(VENV)/.ready
PIP   := $(PY) -m pip --disable-pip-version-check --no-input install -qq

NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
SEES_TORCH := -c 'import sys, torch; \
	sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' >/dev/null 2>&1
# One thread a worker: the processes share the cores already.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest \
	$$($(PY) -c 'import xdist' 2>/dev/null && echo "-n $(JOBS) --dist worksteal") $(ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test deep lint format bench-smoke clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo "Variables: PYTHON=python3.11  ARGS='-k name' (test, deep)  JOBS=2  TORCH=2.13.0  DEMO=build/demo"

setup: $(READY) ## Create .venv and install the package with everything the tests need

demo: $(READY) ## Train the toy task (b), print its table, draw its figures
	@$(BIN)/maskmoe toy --task b --out $(DEMO)
	@echo "The figures lie in $(DEMO):"
	@ls $(DEMO)/*.png

test: $(READY) ## Run the whole suite (ARGS='-m "not slow"' leaves out the slow tests)
	@$(PYTEST)

deep: $(READY) ## Run the suite with 2000 examples a property
	@HYPOTHESIS_PROFILE=deep $(PYTEST)

lint: $(READY) ## Check style, types and the import contract
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(BIN)/lint-imports

format: $(READY) ## Format the code and apply the safe fixes
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench-smoke: $(READY) ## Run every benchmark once on tiny shapes
	@$(PY) -m bench --smoke

clean: ## Remove what was built and cached, but not .venv
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find maskmoe_kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# --- Set-up ----------------------------------------------------------------------------
# Where PYTHON has a usable torch already, .venv borrows its packages: nothing that is
# there is installed again, and a machine without a network can still run the suite.

# A venv made from a venv sees the base interpreter only, so name the outer one's folders.
define BORROW
import pathlib, sys, sysconfig
if sys.prefix != sys.base_prefix:
    here = {"base": "$(VENV)", "platbase": "$(VENV)"}
    site = pathlib.Path(sysconfig.get_path("purelib", "venv", here))
    outer = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "borrowed.pth").write_text("\n".join(outer) + "\n")
endef

# The requirements, extras included, that .venv has in no version.
define MISSING
import importlib.metadata, re, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for line in project["dependencies"] + extras["plot"] + extras["data"] + extras["test"]:
    name = re.match(r"[\w.-]+", line).group()
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        if name != project["name"]:
            print(line)
endef
export BORROW MISSING

$(VENV)/pyvenv.cfg:
	@$(PYTHON) $(NEW_ENOUGH) || { \
	    echo "maskmoe_kernels needs Python 3.11 or newer, and '$(PYTHON)' is not." >&2; \
	    echo "Name another: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@if $(PYTHON) $(SEES_TORCH); then \
	    echo "Creating $(VENV) on top of the packages of $(PYTHON), which has torch."; \
	    $(PYTHON) -m venv --system-site-packages --without-pip $(VENV) && $(PYTHON) -c "$$BORROW"; \
	else \
	    echo "Creating $(VENV)."; \
	    $(PYTHON) -m venv $(VENV); \
	fi

$(READY): pyproject.toml | $(VENV)/pyvenv.cfg
	@$(PY) $(NEW_ENOUGH) || { \
	    echo "$(VENV) holds a Python older than 3.11: remove it and run make again." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null
	@if grep -q 'include-system-site-packages = true' $(VENV)/pyvenv.cfg; then \
	    echo "Installing maskmoe_kernels and what is missing beside it."; \
	    $(PIP) --no-deps --no-build-isolation -e . || \
	        echo "Not installed, so there is no 'maskmoe' command; tests run from the checkout." >&2; \
	    missing=$$($(PY) -c "$$MISSING") || exit 1; \
	    test -z "$$missing" || printf '%s\n' "$$missing" | $(PIP) --retries 1 -r /dev/stdin || { \
	        echo "Could not be installed; what needs them is skipped or will fail:"; \
	        printf '    %s\n' $$missing; } >&2; \
	else \
	    $(PY) $(SEES_TORCH) || { \
	        echo "Installing torch $(TORCH); this takes a minute or more."; \
	        $(PIP) torch==$(TORCH) || { \
	            echo "torch $(TORCH) cannot be had here; taking the newest there is." >&2; \
	            $(PIP) 'torch>=2.11'; }; } || exit 1; \
	    echo "Installing maskmoe_kernels and its tools."; \
	    $(PIP) -e '.[test]' || exit 1; \
	fi
	@touch $@
