PYTHON ?= python3
WITH ?= uv
# Where torch for CPUs is, if pip's own places do not have it: PyPI does not.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN = .venv/bin
REQUIREMENTS = $(shell command -v nvidia-smi >/dev/null 2>&1 && echo requirements.txt || echo requirements-cpu.txt)

help:  ## list what make can do
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: install  ## train the built-in model with SPPO: a few minutes on a laptop
	@echo "Training a built-in model of 360,000 parameters with SPPO: 40 steps, one or two minutes."
	@echo "Loading the libraries takes ten seconds or more."
# One thread: so small a model only waits for more.
	OMP_NUM_THREADS=1 TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python sppo.py

test: install  ## linter and the whole test suite
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup tests

race: install  ## every algorithm on the built-in tasks, and the figures: somewhat over an hour on two idle cores
	$(BIN)/python -m tools.race --jobs 2

race-quick: install  ## one seed of SPPO and GRPO: some minutes
	$(BIN)/python -m tools.race --quick

gpu: install  ## measure one NVIDIA GPU: ten minutes at most, without a network
	$(BIN)/python -m tools.gpu

install: .venv/installed  ## what everything needs, into .venv (for a GPU if there is one)

.venv/installed: requirements.txt requirements-cpu.txt requirements-optional.txt tools/install.py tools/excluded.txt
	$(PYTHON) tools/install.py $(REQUIREMENTS) --torch-index $(TORCH_INDEX) --with $(WITH)
	@touch $@

clean:  ## remove the environment and all runs
	rm -rf .venv runs

.PHONY: help demo test race race-quick gpu install clean
.DEFAULT_GOAL := help
