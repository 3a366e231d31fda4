# `make figure` sets up the environment and runs the default study. `make help` lists all targets.
# The environment is that of environment.yml if it is active, otherwise .venv.
VENV ?= $(if $(filter convergence,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX),.venv)
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.installed
EXPERIMENTS ?= openmoji
PORT ?= 5000
# Two processes; each runs whole files, so that the fixtures of a file are made once.
PYTEST := pytest --numprocesses 2 --dist loadfile
export PATH := $(abspath $(BIN)):$(PATH)
# Snakemake needs a cache outside the project. Without a writable home directory it is here.
ifneq ($(shell test -w "$$HOME" && echo yes),yes)
export XDG_CACHE_HOME ?= $(CURDIR)/.cache
endif

.PHONY: help env figure dry-run report ui track test test-all gpu lint format clean clean-all

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(READY)  ## install the environment into .venv

figure: $(READY)  ## train, sample, evaluate and draw reports/fid_curves.png (EXPERIMENTS=a,b selects studies)
	snakemake --cores all --config experiments=$(EXPERIMENTS) -- reports/fid_curves.png

dry-run: $(READY)  ## show what `make figure` would do
	snakemake --cores all --dry-run --config experiments=$(EXPERIMENTS) -- reports/fid_curves.png

report: $(READY)  ## write all results to one page for a browser: reports/report.html
	snakemake --cores all --config experiments=$(EXPERIMENTS)
	snakemake --report reports/report.html --report-stylesheet workflow/report/report.css \
	  --config experiments=$(EXPERIMENTS)
	@echo 'Open reports/report.html in a browser.'

ui: $(READY)  ## browse the runs in MLflow: "Model training", a study, the view "Arms" (PORT=5001 uses another port)
	@echo 'Open http://127.0.0.1:$(PORT), then "Model training" at the top left, a study, Views, "Arms". Ctrl-C stops.'
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri sqlite:///mlflow.db \
	  --artifacts-destination ./mlartifacts --workers 1 --host 127.0.0.1 --port $(PORT)

track: $(READY)  ## forward to MLflow what an earlier run could not
	convergence sync $(EXPERIMENTS)

test: $(READY)  ## run the fast tests (minutes)
	$(PYTEST) -m "not slow"

test-all: $(READY)  ## run all tests (half an hour)
	$(PYTEST)

gpu: $(READY)  ## measure everything on a GPU in eight minutes: gpu.tar.gz (REFERENCE=clone: benchmarks/README.md)
	python -m benchmarks.gpu --out gpu.tar.gz $(if $(REFERENCE),--reference $(REFERENCE))

lint: $(READY)  ## check style, docstrings, types and dependencies
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow/rules
	snakemake --lint
	mypy
	lint-imports --no-cache
	deptry --no-ansi .

format: $(READY)  ## correct style automatically
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow/rules

clean:  ## delete reports, logs and MLflow's store; keep datasets, checkpoints and metrics
	find reports -mindepth 1 -maxdepth 1 ! -name published -exec rm -r {} +
	rm -rf mlflow.db mlartifacts results/*.log .pytest_cache .ruff_cache .mypy_cache

clean-all: clean  ## delete all results too, including checkpoints
	rm -rf results .snakemake

$(READY): requirements.txt
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))" \
	  || { echo "Python 3.11 to 3.13 is required: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing packages into $(VENV): about 3.5 GB to download, most of it PyTorch, and 7 GB on disk.'
	@start=$$(date +%s); minutes() { echo "$$(( ($$(date +%s) - start + 30) / 60 )) min"; }; \
	while sleep 60 > /dev/null 2>&1 && kill -0 $$$$; do echo "Still installing after $$(minutes)."; done & \
	trap "kill $$!" EXIT; \
	$(BIN)/python -m pip install --requirement requirements.txt && \
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable . && \
	echo "Installed in $$(minutes). Size of $(VENV): $$(du -sh $(VENV) | cut -f1)."
	touch $@
