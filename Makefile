PYTHON ?= python3
WITH ?= uv
# Where torch for CPUs is, if pip's own places do not have it: PyPI does not.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN = .venv/bin
REQUIREMENTS = $(shell command -v nvidia-smi >/dev/null 2>&1 && echo requirements.txt || echo requirements-cpu.txt)

help:  ## list what make can do
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: install  ## train the built-in model with SPPO: a few minutes on a laptop
	@echo "Training a built-in model of 360,000 parameters with SPPO: 70 steps, two to four minutes."
	@echo "Loading the libraries takes ten seconds or more."
# One thread: so small a model only waits for more.
	OMP_NUM_THREADS=1 TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python sppo.py

test: install  ## linter and the whole test suite
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup tests

race: install  ## every algorithm at the papers' batch, and the figures: about an hour on two cores
	$(BIN)/python -m tools.race --jobs 2

race-batches: install  ## what a baseline buys, by the prompts per step: about five hours of runs
	$(BIN)/python -m tools.race --part batches --jobs 2
	$(BIN)/python -m tools.race --part contrast --jobs 2

race-grid: install  ## the best learning rate of each algorithm, which `make race` then also uses: about an hour
	$(BIN)/python -m tools.race --part grid --jobs 2

race-quick: install  ## one seed of SPPO and GRPO at the papers' batch: four minutes
	$(BIN)/python -m tools.race --part quick --jobs 2

lesson: install  ## the pictures of docs/pictures, from three runs of the built-in model: half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.lesson

control: install  ## SPPO without a language model (examples/control.py): one to three minutes, after installing Gymnasium
	$(BIN)/python -m pip install -q -r requirements-control.txt
	OMP_NUM_THREADS=1 $(BIN)/python examples/control.py

gpu: install  ## measure one NVIDIA GPU: ten minutes at most, without a network
	$(BIN)/python -m tools.gpu

install: .venv/installed  ## what everything needs, into .venv (for a GPU if there is one)

.venv/installed: requirements.txt requirements-cpu.txt tools/install.py tools/excluded.txt
	$(PYTHON) tools/install.py $(REQUIREMENTS) --torch-index $(TORCH_INDEX) --with $(WITH)
	@touch $@

clean:  ## remove the environment and all runs
	rm -rf .venv runs

.PHONY: help demo test race race-batches race-grid race-quick lesson control gpu install clean
.DEFAULT_GOAL := help
