# Every target sets up what it needs in .venv; see `make help`.

PYTHON ?= python3
PYTHON312 ?= python3.12
JOBS   ?= 2
ARGS   ?=
SEED   ?= 0
TORCH  ?= 2.13.0
DEMO   ?= build/demo

VENV  := .venv
BIN   := $(VENV)/bin
PY    := $(BIN)/python
READY := $(VENV)/.ready
BUILT := maskmoe_kernels/_build.json
INSTALL := --disable-pip-version-check --no-input install -qq
PIP   := $(PY) -m pip $(INSTALL)

FUZZED := layers:100000 mlp:30000 ops:100000 files:10000
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
# Tests of ops that know no instruction set: of PyTorch's, Triton's and CUDA's kernels.
OF_OTHERS := $(patsubst %,--ignore=tests/ops/%,selection triton_support) \
	--ignore-glob='*/test_cuda*' --ignore-glob='*/test_triton*'
TRIAL := build/wheel-$(TORCH)
OLDEST := build/oldest
INTEROP := build/interop
DOCS := build/docs
EXPLAINERS := build/explainers

NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
SEES_TORCH := -c 'import sys, torch; \
	sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' >/dev/null 2>&1
SETUPTOOLS := -c 'import setuptools, sys; \
	sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null
# Who works on the kernels builds those for GPUs too, where nvcc is: naming it asks for them.
export CUDACXX ?= $(shell command -v nvcc 2>/dev/null)
# One thread a worker: the processes share the cores already. Tests start Python a hundred times, so what
# they import is compiled once, whatever the environment says.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PY) -m pytest \
	$$($(PY) -c 'import xdist' 2>/dev/null && echo "-n $(JOBS) --dist worksteal") $(ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup build demo test deep mutants sanitize emulate lint format bench bench-smoke gpu-static gpu-check wheel test-wheel test-oldest test-interop docs posthoc clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo "Variables: PYTHON=python3.11  ARGS='-k name' (test, deep, mutants, bench)  JOBS=2  TORCH=2.13.0"
	@echo "           DEMO=build/demo  SEED=0 (deep)  PYTHON312=python3.12 (test-oldest)  CXX=g++"
	@echo "           MASKMOE_BUILD=auto|cpu|cuda|none"

setup: $(BUILT) ## Create .venv and install the package with everything the tests need

build: $(READY) ## Build the C++ extension in place, or say why it cannot be built
	@$(BUILD_IN_PLACE)

demo: $(BUILT) ## Train the toy task (b), print its table, draw its figures
	@$(BIN)/maskmoe toy --task b --out $(DEMO) --overwrite
	@echo "The figures lie in $(DEMO):"
	@ls $(DEMO)/*.png

test: $(BUILT) ## Run the whole suite (ARGS='-m "not slow"' leaves out the slow tests)
	@$(PYTEST)

deep: $(BUILT) ## Run the suite with 2000 examples a property, then every fuzzer for long (SEED=0)
	@HYPOTHESIS_PROFILE=deep $(PYTEST)
	@for of in $(FUZZED); do \
	    $(PY) -m tests.fuzz $${of%:*} --cases $${of#*:} --seed $(SEED) || exit 1; done

mutants: $(BUILT) ## Change the code in 180 places, one at a time: do the tests notice? (40 minutes)
	@$(PY) -m tests.mutants --jobs $(JOBS) $(ARGS)

sanitize: $(READY) ## Run the kernels' tests with the address and undefined-behaviour sanitizers
	@CXX="$(CXX)" CXXFLAGS="$(SANITIZE)" MASKMOE_BUILD=cpu \
	    $(PY) setup.py -q build_ext --build-lib build/sanitize
	@export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) \
	        $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	    UBSAN_OPTIONS=print_stacktrace=1 \
	    CXXFLAGS="$(SANITIZE)" \
	    MASKMOE_EXTENSION=$(CURDIR)/build/sanitize/maskmoe_kernels/_C.abi3.so; \
	$(PY) -c 'import sys, maskmoe_kernels as mk; sys.exit(mk.info()["backends"]["native"]["unsupported_reason"])' && \
	$(PYTEST) $(wildcard tests/ops/test_native.py) tests/ops

emulate: $(READY) ## Run the kernels' tests with AVX-512, its bfloat16 and AMX in plain C++
	@CXX="$(CXX)" CXXFLAGS="$(CXXFLAGS)" MASKMOE_EMULATE=1 MASKMOE_BUILD=cpu \
	    $(PY) setup.py -q build_ext --build-lib build/emulate
	@export MASKMOE_EXTENSION=$(CURDIR)/build/emulate/maskmoe_kernels/_C.abi3.so; \
	$(PY) -c 'from maskmoe_kernels.ops import native; native.set_isa("amx-emulated")' && \
	$(PYTEST) tests/ops $(OF_OTHERS)

lint: $(READY) ## Check style, types and the import contract
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(BIN)/lint-imports

format: $(READY) ## Format the code and apply the safe fixes
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(BUILT) ## Measure against every rival (ARGS='--suite full --out runs/full')
	@$(PY) -m bench $(ARGS)

bench-smoke: $(BUILT) ## Run every benchmark once on tiny shapes
	@$(PY) -m bench --smoke

gpu-static: $(READY) ## Compile every GPU kernel, without a GPU, and compare with the committed table
	@$(PY) -m bench.gpu.static --check $(wildcard bench/results/static/kernels-triton*.json) $(ARGS)

gpu-check: $(BUILT) ## The GPU lab (ARGS='prove', 'measure', 'tune', '--dry-run')
	@$(PY) -m bench.gpu.check $(ARGS)

wheel: $(READY) ## Build the wheel into dist/ and check what it asks of Python and torch
	@rm -rf dist build/lib* build/bdist*
	@$(PY) -m pip wheel -q --no-build-isolation --no-deps --wheel-dir dist .
	@$(PY) -c 'import abi3info' 2>/dev/null || $(PIP) --retries 1 abi3info || \
	    echo "abi3info cannot be had here: Python's names are judged by their first letter." >&2
	@$(PY) -m tests.abi dist/*.whl

test-wheel: wheel ## Run the suite against the wheel, installed with torch TORCH in build/wheel-TORCH
	@test -e $(TRIAL)/bin/python || $(PYTHON) -m venv $(TRIAL)
	@$(TRIAL)/bin/python -m pip $(INSTALL) torch==$(TORCH)
	@$(TRIAL)/bin/python -m pip $(INSTALL) "$$(echo dist/*.whl)[test]"
	@$(TRIAL)/bin/python -m pip $(INSTALL) --force-reinstall --no-deps dist/*.whl
	@rm -rf $(TRIAL)/suite && mkdir $(TRIAL)/suite
	@cp -R pyproject.toml *.md *.cff tests bench $(TRIAL)/suite
	@cd $(TRIAL)/suite && OMP_NUM_THREADS=1 \
	    ../bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# The extension is the one in place: built against any torch, it has to load in the oldest.
test-oldest: $(BUILT) $(OLDEST)/.ready ## Run the suite in build/oldest: Python 3.12, torch 2.11, Triton 3.6
	@OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m pytest \
	    -n $(JOBS) --dist worksteal $(ARGS)

test-interop: $(BUILT) $(INTEROP)/.ready ## Run tests/interop with zuko, nflows, pyro, captum, peft, accelerate, safetensors, ONNX
	@OMP_NUM_THREADS=1 $(INTEROP)/bin/python -m pytest tests/interop tests/test_docs.py tests/nn/test_deployment.py \
		tests/nn/test_unrouted.py $(ARGS)

docs: $(BUILT) $(DOCS)/.ready ## Build the documentation into build/docs/html; a warning is an error
	@PYTHONPATH=$(CURDIR) $(DOCS)/bin/python -m sphinx -q -W --keep-going docs $(DOCS)/html
	@echo "The pages are in $(DOCS)/html/index.html"

posthoc: $(BUILT) $(EXPLAINERS)/.ready ## Explain the toy by LIME, KernelSHAP, IntegratedGradients, DeepLift, and by experts
	@OMP_NUM_THREADS=1 $(EXPLAINERS)/bin/python -m bench posthoc $(ARGS)

clean: ## Remove what was built and cached, but not .venv
	@rm -f maskmoe_kernels/_C.abi3.so maskmoe_kernels/_build.json
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

# The requirements, extras included, that are there in no version. The build's programs need not be
# Python packages.
define MISSING
import importlib.metadata, re, shutil, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for line in project["dependencies"] + extras["plot"] + extras["data"] + extras["triton"] + extras["test"]:
    name = re.match(r"[\w.-]+", line).group()
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        program = name in ("cmake", "ninja") and shutil.which(name)
        if name != project["name"] and not program:
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
	    $(PY) $(SETUPTOOLS) || $(PIP) --retries 1 'setuptools>=77' || true; \
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
	    $(PIP) -e '.[test]' 'setuptools>=77' || exit 1; \
	fi
	@touch $@

# The oldest that pyproject.toml allows. Before 3.7, Triton's interpreter wants numpy before 2.4.
$(OLDEST)/.ready: pyproject.toml
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { \
	    echo "The oldest versions run on Python 3.12, and '$(PYTHON312)' is not." >&2; \
	    echo "Name another: make PYTHON312=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing torch 2.11 into $(OLDEST), 5 GB where it comes with CUDA."
	@$(PYTHON312) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip $(INSTALL) 'setuptools>=77' cmake ninja 'numpy<2.4' \
	    torch==2.11.0 'triton==3.6.0; platform_system == "Linux"'
	@missing=$$($(OLDEST)/bin/python -c "$$MISSING") || exit 1; test -z "$$missing" || \
	    printf '%s\n' "$$missing" | $(OLDEST)/bin/python -m pip $(INSTALL) -r /dev/stdin
	@touch $@

# What people use beside this package, and what builds the pages, come with much else, so they get
# venvs on top of .venv: ON_TOP takes the folder, EXTRA prints what an extra requires.
define ON_TOP
import pathlib, sys, sysconfig
over = dict.fromkeys(("base", "platbase"), sys.argv[1])
lines = [f"import site; site.addsitedir({sysconfig.get_path(kind)!r})" for kind in ("purelib", "platlib")]
site = pathlib.Path(sysconfig.get_path("purelib", "venv", over))
(site / "borrowed.pth").write_text("\n".join(dict.fromkeys(lines)) + "\n")
endef
define EXTRA
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
endef
export ON_TOP EXTRA

# The folder has the name of the extra.
$(INTEROP)/.ready $(EXPLAINERS)/.ready: build/%/.ready: pyproject.toml | $(READY)
	@$(PY) -m venv build/$* && $(PY) -c "$$ON_TOP" build/$*
	@$(PY) -c "$$EXTRA" $* | while read -r line; do \
	    build/$*/bin/python -m pip $(INSTALL) --retries 1 "$$line" || \
	        echo "$$line could not be installed; what needs it is left out." >&2; done
	@touch $@

$(DOCS)/.ready: pyproject.toml | $(READY)
	@$(PY) -m venv $(DOCS) && $(PY) -c "$$ON_TOP" $(DOCS)
	@$(PY) -c "$$EXTRA" docs | $(DOCS)/bin/python -m pip $(INSTALL) --retries 1 -r /dev/stdin
	@touch $@

# pip has built the extension already, without a word; what is compiled is not compiled again. Its
# record is written anew every time, and removed when a build fails.
define BUILD_IN_PLACE
if $(PY) $(SETUPTOOLS); then $(PY) setup.py -q build_ext --inplace; \
    else echo "maskmoe_kernels is built without the extension: no setuptools 77 in $(VENV)" >&2; fi
endef

# Folders count, too: a file may have been removed.
$(BUILT): setup.py CMakeLists.txt $(shell find csrc 2>/dev/null) $(READY)
	@$(BUILD_IN_PLACE)
