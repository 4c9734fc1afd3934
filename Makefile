# Every target sets up .venv by itself; the second time that takes no time.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := requirements/constraints.txt
READY := .venv/.ready
# Two OpenMP threads on a busy machine can be ten times slower than one.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all lint format bench bench-loop bench-gpu skill evals-check clean

demo: $(READY)  ## generate a script and train with it on real data
	$(BIN)/generate-script --amp --checkpointing -o demo/train.py --force
	cd demo && OMP_WAIT_POLICY=passive ../$(BIN)/python train.py

test: lint  ## what CI runs
	$(TEST) -m "not slow"

test-all: lint  ## with the long sweeps
	$(TEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## what the generator costs, beside its parts
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/generator.py

skill:  ## dist/pytorch-optimization.skill, and the same unpacked beside it
	$(PYTHON) .ci/make_skill.py

evals-check: $(READY)  ## verifiers fail on empty and wrong answers, pass on right ones
	OMP_NUM_THREADS=1 $(BIN)/python evals/check.py

bench-loop:  ## the loop beside its peers; requirements/bench-loop.txt sets .venv-bench up
	OMP_NUM_THREADS=1 .venv-bench/bin/python benchmarks/loop.py

bench-gpu:  ## the same on a GPU, with the Python that has its torch: PYTHON=python3.12
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .ruff_cache

# torch first and by itself: a package that asks for any torch would pick the newest.
$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c $(CONSTRAINTS) torch
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e ".[torch,data,demo,dev]"
	touch $@
