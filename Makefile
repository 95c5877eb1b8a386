# The README's two commands. Both make the virtual environment and install on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo grid test check docs figures clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed  ## run the main job: every method on the embedded world
	$(BIN)/python -m lm.train

CORES ?= 2
grid: $(VENV)/installed  ## the study on the embedded world, hours; stop and repeat at will. SEEDS=[0] RHOS=[0.2,0.8] for a part
	$(BIN)/snakemake -s lm/workflow/Snakefile --directory runs/grid --cores $(CORES) \
		$(if $(SEEDS)$(RHOS),--config $(if $(SEEDS),'seeds=$(SEEDS)') $(if $(RHOS),'rhos=$(RHOS)'))
	@echo "summary: runs/grid/grid.json; figures are drawn from figures/results/grid.json"

check: $(VENV)/installed  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy theory bandits lm figures

docs: $(VENV)/installed  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

test: check docs  ## lint, types, the site and all tests; a process for each core, since tests are too small to share their threads
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

figures: $(VENV)/installed  ## redraw every figure from saved results
	$(BIN)/python -m figures

clean:  ## remove the environment, caches and the site, not results
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
