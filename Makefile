# make train   environment, dependencies, then the main job on the Python library's source: trains, evaluates, prints a sample
# make test    environment, dependencies, the test suite
# make long    what takes longest of it: more cells, kinds of processors and restarts, for the same equalities; more damage
# make faults  processes killed, stopped and stuck, a job on Slurm, for half an hour; prints a table of what was seen
# make chaos   100 jobs disturbed at random, of other processes and devices at every start; an hour or so
# make soak    a job for two hours with a fault every minute; prints its goodput
# make bench   speed, memory and scaling beside PyTorch, flax and dm-haiku, in an environment of its own; hours
# make gpu     on a machine with a GPU, at most eight minutes: its bits, its values beside float64, its speed beside PyTorch
#              and flax; fails, and says what, where something is not as it is to be
# make notebooks   executes the notebooks again, for 40 minutes or so; CHARLSTM_SHORT=1 tries them, and leaves them as they are
# make interop models exchanged with PyTorch, onnxruntime, flair and OpenAI's client, curves with TensorBoard, in an environment
#              that has these, without JAX
# make lint    style and types
#
# PYTHON chooses the interpreter (3.11, 3.12 or 3.13); ARGS adds flags to the training command, BENCH_ARGS=--quick to
# the benchmarks, INTEROP_ARGS flags to pytest.  TORCH is the requirement of PyTorch: the plain one brings CUDA, gigabytes
# of it.  Where there is an NVIDIA GPU, the benchmarks' JAX comes with CUDA 13; a driver older than 580 needs
# BENCH_EXTRAS=bench,cuda12, and kernels of our own need Python 3.12 or later, for its JAX.  GPU_PYTHON=... is an
# interpreter for make gpu, with the JAX, PyTorch and flax that it has: nothing is installed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMMA := ,
ARGS ?=
RUN_DIR ?= runs/quickstart
# What is trained, scored and sampled: the --run_dir of ARGS, the last if there are several, also with a space before its
# value; else RUN_DIR.
RUN := $(or $(patsubst --run_dir=%,%,$(lastword $(filter --run_dir=%,$(subst --run_dir ,--run_dir=,$(strip $(ARGS)))))),$(RUN_DIR))
SHORT := not faults and not long and not interop
PYTEST_ARGS ?= -n 2 --dist=worksteal
FAULTS_ARGS ?=
INTEROP_ARGS ?=
TORCH ?= torch
BENCH_ARGS ?=
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)
GPUS := $(wildcard /dev/nvidia[0-9]*)
BENCH_EXTRAS ?= bench$(if $(GPUS),$(COMMA)cuda13)
BENCH := .venv-bench/with-$(VERSION)-$(subst $(COMMA),-,$(BENCH_EXTRAS))
INTEROP := .venv-interop/with-$(VERSION)
GPU_PYTHON ?=
SAY := printf '%s\n'
NO_PACKAGES := the packages could not be installed: see above.  With the network and some 2 GB of disk there, type make again.
NO_VENV := the environment $(VENV) could not be made: see above.  With some 2 GB of free disk there, type make again.
OTHERS := onnx onnxruntime openai flair tensorboard
BENCHMARKS := train_step sampling end_to_end input remote readers parts scaling agreement restore

# Before an environment of another Python is removed.
define REFUSE_PYTHON
@test -n "$(VERSION)" || { $(SAY) "there is no $(PYTHON): name a Python that is there, make PYTHON=python3.12"; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ $(SAY) "Python $(VERSION) is too old: name 3.11 or later, make PYTHON=python3.12"; exit 1; }
@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || \
	{ $(SAY) "this Python has no venv: on Debian and Ubuntu, sudo apt install python3-venv"; exit 1; }
endef

.PHONY: train test long faults chaos soak bench gpu notebooks interop lint lock clean

train: $(VENV)/installed
	$(BIN)/python -m launch.train --flagfile=configs/quickstart.flags --run_dir=$(RUN) $(ARGS)
	$(BIN)/python -m launch.evaluate --run_dir=$(RUN) --split=test
	$(BIN)/python -m launch.sample --run_dir=$(RUN) --prompt="    def read(self" --length=400 --temperature=0.6 --seed=2

test: $(VENV)/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "$(SHORT) and not optimized"
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "$(SHORT) and optimized"

long: $(VENV)/installed
	$(BIN)/python -m pytest -m "long and not optimized" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "long and optimized" $(PYTEST_ARGS)
	CHARLSTM_FUZZ=8 $(BIN)/python -m pytest -m "$(SHORT) and not optimized" $(PYTEST_ARGS) tests/data_pipeline tests/run/test_fuzzed_borders.py

faults: $(VENV)/installed
	$(BIN)/python -m pytest -m faults $(FAULTS_ARGS)

chaos: $(VENV)/installed
	$(BIN)/python -m tests.faults.chaos --seeds=100

soak: $(VENV)/installed
	$(BIN)/python -m tests.faults.soak --minutes=120 --processes=1

bench: $(BENCH)
	set -e; for benchmark in $(BENCHMARKS); do .venv-bench/bin/python -m benchmarks.$$benchmark $(BENCH_ARGS); done

gpu: $(if $(GPU_PYTHON),,$(BENCH))
	$(or $(GPU_PYTHON),.venv-bench/bin/python) -m benchmarks.gpu $(BENCH_ARGS)

notebooks: $(VENV)/installed
	$(BIN)/python -m notebooks.execute

interop: $(VENV)/installed $(INTEROP)
	CHARLSTM_INTEROP_PYTHON=$(CURDIR)/.venv-interop/bin/python $(BIN)/python -m pytest -m interop $(INTEROP_ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy charlstm data_pipeline launch benchmarks

# The lock holds for Python 3.11 to 3.13 at once; `make lock` writes it anew.  The project itself is built by the lock's
# own setuptools, so that nothing is fetched for it.  An environment that is half made, or of another Python, is made anew.
$(VENV)/installed: requirements.lock pyproject.toml $(VENV)/python-$(VERSION)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock || { $(SAY) "$(NO_PACKAGES)"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/python-$(VERSION):
	$(REFUSE_PYTHON)
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV) || { $(SAY) "$(NO_VENV)"; exit 1; }
	touch $@

$(BENCH): requirements.lock pyproject.toml
	$(REFUSE_PYTHON)
	test -e .venv-bench/python-$(VERSION) -a -z "$(filter-out $@,$(wildcard .venv-bench/with-*))" || rm -rf .venv-bench
	test -e .venv-bench/python-$(VERSION) || $(PYTHON) -m venv .venv-bench
	touch .venv-bench/python-$(VERSION)
	.venv-bench/bin/python -m pip install --disable-pip-version-check -r requirements.lock '$(TORCH)' -e '.[$(BENCH_EXTRAS)]'
	touch $@

# The Makefile names its packages.  Tests of a package that cannot be installed here are skipped.
$(INTEROP): Makefile
	test -z "$(filter-out $@,$(wildcard .venv-interop/with-*))" || rm -rf .venv-interop
	test -x .venv-interop/bin/python || $(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --disable-pip-version-check '$(TORCH)' safetensors numpy
	for package in $(OTHERS); do .venv-interop/bin/python -m pip install --disable-pip-version-check '$(TORCH)' $$package || \
		$(SAY) "$$package could not be installed: its tests are skipped"; done
	touch $@

lock:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra dev --no-annotate --no-header --upgrade pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .venv-bench .venv-interop
