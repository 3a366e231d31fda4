# make figure: everything, from an empty machine to the figure. make help lists the rest.
# The environment of environment.yml where that is active, else one of its own.
VENV ?= $(if $(filter convergence,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX),.venv)
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.installed
EXPERIMENTS ?= openmoji
PORT ?= 5000
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help env figure dry-run report ui track test test-all lint format clean clean-all

help:  ## these lines
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(READY)  ## the environment alone, in .venv

figure: $(READY)  ## train, sample, evaluate and draw reports/fid_curves.png (EXPERIMENTS=a,b chooses studies)
	snakemake --cores all --config experiments=$(EXPERIMENTS) -- reports/fid_curves.png

dry-run: $(READY)  ## what `make figure` would do
	snakemake --cores all --dry-run --config experiments=$(EXPERIMENTS) -- reports/fid_curves.png

report: $(READY)  ## all of it in one file for a browser: reports/report.html
	snakemake --cores all --config experiments=$(EXPERIMENTS)
	snakemake --report reports/report.html --report-stylesheet workflow/report/report.css \
	  --config experiments=$(EXPERIMENTS)
	@echo 'Open reports/report.html in a browser.'

ui: $(READY)  ## browse the runs in MLflow: choose "Model training", a study, then the view "Arms" (PORT=5001: elsewhere)
	@echo 'http://127.0.0.1:$(PORT): choose "Model training" at the top left, a study, then Views, "Arms". Ctrl-C ends it.'
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri sqlite:///mlflow.db \
	  --artifacts-destination ./mlartifacts --workers 1 --host 127.0.0.1 --port $(PORT)

track: $(READY)  ## forward to MLflow what an earlier run could not
	python -m workflow.tracking sync $(subst $(comma), ,$(EXPERIMENTS))

test: $(READY)  ## the tests, in minutes
	pytest -m "not slow"

test-all: $(READY)  ## the slow ones too
	pytest

lint: $(READY)  ## style and docstrings of Python and Snakemake files, types, unused dependencies
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow/rules
	snakemake --lint
	mypy
	lint-imports --no-cache
	deptry --no-ansi .

format: $(READY)  ## mend what lint finds, where that can be automatic
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow/rules

clean:  ## drop figures, tables, logs and MLflow's store; keep datasets, checkpoints and metrics
	rm -rf reports/*.png reports/*.svg reports/*.csv reports/*.md reports/*.html reports/pages mlflow.db mlartifacts results/*.log .pytest_cache .ruff_cache .mypy_cache

clean-all: clean  ## drop all results too, with every trained net
	rm -rf results .snakemake

comma := ,

$(READY): requirements.txt
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))" \
	  || { echo "Python 3.11 to 3.13 is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
