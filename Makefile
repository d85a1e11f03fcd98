# make train   environment, dependencies, then the main job on the embedded corpus: trains, evaluates, prints a sample
# make test    environment, dependencies, the whole test suite
# make faults  processes killed, stopped and stuck, a job on Slurm, for minutes; prints a table of what was seen
# make chaos   100 jobs disturbed at random, of other processes and devices at every start; an hour or so
# make soak    a job for two hours with a fault every minute; prints its goodput
# make lint    style and types
#
# PYTHON chooses the interpreter (3.11, 3.12 or 3.13); ARGS adds flags to the training command.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/quickstart
ARGS ?=
PYTEST_ARGS ?= -n 2

.PHONY: train test faults chaos soak lint lock clean

train: $(VENV)/installed
	$(BIN)/python -m launch.train --flagfile=configs/quickstart.flags --run_dir=$(RUN_DIR) $(ARGS)
	$(BIN)/python -m launch.evaluate --run_dir=$(RUN_DIR) --split=test
	$(BIN)/python -m launch.sample --run_dir=$(RUN_DIR) --prompt="class Parser" --length=600 --temperature=0.7

test: $(VENV)/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

faults: $(VENV)/installed
	$(BIN)/python -m pytest -m faults

chaos: $(VENV)/installed
	$(BIN)/python -m tests.faults.chaos --seeds=100

soak: $(VENV)/installed
	$(BIN)/python -m tests.faults.soak --minutes=120 --processes=1

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lock holds for Python 3.11 to 3.13 at once; `make lock` writes it anew.
$(VENV)/installed: requirements.lock
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; assert (3, 11) <= v, f"Python {v[0]}.{v[1]} is too old: name 3.11 or later, make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

lock:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra dev --no-annotate --no-header --upgrade pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV)
