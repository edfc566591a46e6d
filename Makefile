PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes that share the tests; 0 runs them in one.
WORKERS ?= 2
# Tests that need no other machine and no hour, `long` ones included.
LOCAL := not gpu and not slow and not network
# The lower bounds of the extra `train`, beside those of constraints-oldest.txt.
OLDEST_TRAIN = $(shell sed -n 's/^train = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",' | sed 's/>=/==/g')
# Checkout of LLaVA for `make hosts`; the default one is fetched.
LLAVA ?= .hosts/LLaVA
# Folder of checkouts of LLaVA's forks for `make forks`, by the names that tests/fork_recipes.py has.
HOSTS ?= .hosts

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# A stamp per set of packages: make installs again when one of the files that name the packages is newer.
PIP_STAMP := $(VENV)/.installed-pip
PACKAGE_STAMP := $(VENV)/.installed-package
DEV_STAMP := $(VENV)/.installed-dev
DOCS_STAMP := $(VENV)/.installed-docs
NOTEBOOKS_STAMP := $(VENV)/.installed-notebooks
REQUIREMENTS := pyproject.toml constraints.txt src/diffenc/_version.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo notebooks results test test-long test-shapes test-oldest test-oldest-train app ray lmms hosts forks lint format types layers docs wheel check gpu clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 picks the interpreter for $(VENV); ARGS='-k name' is passed on to demo, notebooks and test."

demo: $(PACKAGE_STAMP)  ## Ask three questions of a bundled picture, and draw what each lights up in diffenc-demo.png
	$(BIN)/diffenc demo -o diffenc-demo.png --force $(ARGS)

notebooks: $(NOTEBOOKS_STAMP)  ## Run the notebooks of docs/tutorials anew, from examples
	$(BIN)/python tools/notebooks.py $(ARGS)

results: $(PACKAGE_STAMP)  ## Make the page and the picture of the study of features in docs/results anew
	$(BIN)/diffenc study features -o docs/results --force

test: $(DEV_STAMP)  ## Run the tests that need no GPU, no network and little time
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-long: $(DEV_STAMP)  ## Run the tests that take seconds each, which `make test` leaves out and CI runs
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "long and $(LOCAL)" $(ARGS)

test-shapes: $(DEV_STAMP)  ## Run the tests with every shape annotation checked at run time
	$(BIN)/python -m pytest -m "$(LOCAL)" --jaxtyping-packages=diffenc,runtime_types.checked $(ARGS)

test-oldest: | $(BIN)/python  ## Run the unit and integration tests with the oldest versions the package asks for
	test -d .venv-oldest || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		--editable ".[viz,parquet]" accelerate pytest pytest-timeout
	.venv-oldest/bin/python -m pytest -m "$(LOCAL)" -W default tests/unit tests/integration $(ARGS)

test-oldest-train: | $(BIN)/python  ## Run the tests of training and of transformers' classes with the oldest versions for training
	test -d .venv-oldest-train || $(PYTHON) -m venv .venv-oldest-train
	.venv-oldest-train/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		--editable ".[viz,parquet]" pytest pytest-timeout
	.venv-oldest-train/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST_TRAIN)
	.venv-oldest-train/bin/python -m pytest -m "$(LOCAL)" -W default -k "train or vlm or transformers" \
		tests/unit tests/integration $(ARGS)

app: | $(BIN)/python  ## Open the page of `diffenc app` in a headless Chromium, in an environment of its own
	test -d .venv-app || $(PYTHON) -m venv .venv-app
	.venv-app/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-app.txt \
		--editable ".[app]" playwright pytest pytest-timeout
	.venv-app/bin/python -m pytest -rs tests/integration/test_app_page.py $(ARGS)

ray: | $(BIN)/python  ## Run an extractor under Ray Data, a worker killed, and its page, in an environment of its own
	test -d .venv-ray || $(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--editable ".[ray,datasets]" pytest pytest-timeout
	.venv-ray/bin/python -m pytest -rs -m "$(LOCAL)" -k engines \
		tests/integration/test_extraction_engines.py tests/test_docs_snippets.py $(ARGS)

# PyPI's torchvision does not fit a CPU build of torch, and no task of these tests needs it.
lmms: | $(BIN)/python  ## Run models through lmms-eval, which gets an environment of its own
	test -d .venv-lmms || $(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lmms.txt \
		--editable . lmms-eval pyarrow pytest pytest-timeout
	.venv-lmms/bin/python -c "import torchvision" 2>/dev/null || \
		.venv-lmms/bin/python -m pip uninstall --quiet --yes torchvision
	.venv-lmms/bin/python -m pytest tests/integration/test_lmms_eval_run.py $(ARGS)

# LLaVA's own dependencies are of 2024 and refuse diffenc's: its code is installed alone, beside what it imports.
hosts: $(LLAVA)/pyproject.toml | $(BIN)/python  ## Train and ask LLaVA's own code on a tower, in an environment of its own
	test -d .venv-hosts || $(PYTHON) -m venv .venv-hosts
	.venv-hosts/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-llava.txt \
		--editable . accelerate sentencepiece requests pytest pytest-timeout
	.venv-hosts/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable $(LLAVA)
	DIFFENC_LLAVA_CHECKOUT=$(LLAVA) .venv-hosts/bin/python -m pytest tests/integration/test_llava_checkout.py $(ARGS)

.hosts/LLaVA/pyproject.toml:
	git clone --quiet https://github.com/haotian-liu/LLaVA .hosts/LLaVA
	git -C .hosts/LLaVA checkout --quiet c121f04

# Any Python from 3.10 on: the forks are of its time. decord and the others are what their code imports beside diffenc.
FORK_IMPORTS := accelerate sentencepiece requests protobuf timm torchvision open_clip_torch opencv-python-headless decord scipy \
	fvcore shortuuid ezcolorlog tiktoken transformers_stream_generator tyro einops-exts datasets draccus jsonlines matplotlib
forks:  ## Ask and train the forks of LLaVA that lie in HOSTS, on a tower, in an environment of its own
	test -d .venv-forks || $(PYTHON) -m venv .venv-forks
	DS_BUILD_OPS=0 .venv-forks/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-forks.txt \
		--editable . $(FORK_IMPORTS) deepspeed pytest pytest-timeout
	DIFFENC_HOSTS=$(abspath $(HOSTS)) .venv-forks/bin/python -m pytest -rs tests/integration/test_forks_checkout.py $(ARGS)

lint: $(DEV_STAMP)  ## Check style, formatting and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell

format: $(DEV_STAMP)  ## Repair what ruff can repair
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(DEV_STAMP)  ## Check types (mypy --strict)
	$(BIN)/mypy

layers: $(DEV_STAMP)  ## Check that imports go one way
	$(BIN)/lint-imports

docs: $(DOCS_STAMP)  ## Build the documentation into site/
	$(BIN)/zensical build --strict --clean

wheel: $(DEV_STAMP)  ## Build the wheel into dist/, look inside, and run it away from the checkout
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist
	$(BIN)/python tools/check_wheel.py dist/*.whl

check: test test-long lint types layers docs wheel  ## All checks that CI runs

# Nothing is installed, so that it runs without a network: in $(VENV) where that is, else in $(PYTHON).
gpu:  ## Run the tests that need a GPU and the benchmarks, and write gpu-report.json and .md
	PYTHONPATH=src $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(ARGS)

clean:  ## Remove what builds and checks leave behind, but not the environment
	rm -rf dist site .cache .import_linter_cache .mypy_cache .pytest_cache .ruff_cache diffenc-demo.png gpu-report.json gpu-report.md
	find src tests tools examples benchmarks -name __pycache__ -type d -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "'$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "diffenc needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

$(PIP_STAMP): constraints.txt | $(BIN)/python
	$(INSTALL) --upgrade pip
	@touch $@

$(PACKAGE_STAMP): $(REQUIREMENTS) | $(PIP_STAMP)
	$(INSTALL) --build-constraint constraints.txt --editable .
	@touch $@

$(DEV_STAMP): $(REQUIREMENTS) | $(PIP_STAMP)
	$(INSTALL) --build-constraint constraints.txt --editable ".[all]" --group dev
	@touch $@ $(PACKAGE_STAMP)

$(NOTEBOOKS_STAMP): $(REQUIREMENTS) | $(PIP_STAMP)
	$(INSTALL) --build-constraint constraints.txt --editable . --group notebooks
	@touch $@ $(PACKAGE_STAMP)

# The pages are made from the source text: neither torch nor the package is needed.
$(DOCS_STAMP): pyproject.toml constraints.txt | $(PIP_STAMP)
	$(INSTALL) --group docs
	@touch $@
