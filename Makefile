# `make help` lists the targets. Each makes the virtual environment and installs what it needs on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: help demo grid study real check docs quick test thorough figures clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

$(VENV)/lm: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[lm]'
	touch $@

$(VENV)/dev: $(VENV)/lm
	$(PIP) -e '.[dev]'
	touch $@

demo: $(VENV)/lm  ## run the main job: every method on the embedded world
	$(BIN)/python -m lm.train

CORES ?= 2
grid: $(VENV)/dev  ## a grid on the embedded world, hours; stop and repeat at will. SEEDS=[0] RHOS=[0.2,0.8] for a part
	$(BIN)/snakemake -s lm/workflow/Snakefile --directory runs/grid --cores $(CORES) \
		$(if $(SEEDS)$(RHOS),--config $(if $(SEEDS),'seeds=$(SEEDS)') $(if $(RHOS),'rhos=$(RHOS)'))
	@echo "summary: runs/grid/grid.json; figures are drawn from figures/results/grid.json"

study: $(VENV)/dev  ## the study of docs/study.md, a day or two: stop and repeat at will. STUDY=n3000-s1/grid.json for a corner
	$(BIN)/snakemake -s lm/workflow/Snakefile --directory runs/study --configfile lm/workflow/study.yaml --cores $(CORES) $(STUDY)

REAL_HOURS ?= 48
real: $(VENV)/dev  ## the study on real text, days: stop and repeat at will; REAL_HOURS=2 stops by itself. Needs what docs/own-data.md installs
	$(BIN)/python -m lm.workflow.real --hours $(REAL_HOURS) --cores $(CORES) $(REAL)

check: $(VENV)/dev  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy theory bandits lm figures

docs: $(VENV)/dev  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

quick: $(VENV)/dev  ## losses, theory, methods, data, log-probs, trainer: what a change is tried on, under 100 CPU seconds
	$(TESTS) -m 'not slow and not thorough' theory lm/objectives_test.py lm/data lm/logprobs lm/training/trainer_test.py

test: check docs  ## all of CI: lint, types, the site and the tests; a process for each core, since tests are too small for more threads
	$(TESTS)

thorough: $(VENV)/dev  ## every test, also what is costly and rarely broken
	$(TESTS) -m ''

figures: $(VENV)/lm  ## redraw every figure from saved results
	$(BIN)/python -m figures

clean:  ## remove the environment, caches and the site, not results
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
