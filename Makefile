# Two commands do everything on a fresh machine with Python and make:
#   make demo   installs into .venv and runs the main job, examples/distill_digits.py
#   make test   installs into .venv and runs all checks that gate a change
# A contributor's day: make fmt, make check (format, lint, types), make docs (build/site), make package (dist), make bench, make parity,
# make test-lowest, make clean.
# On a machine with a GPU: make gpu.

PYTHON ?= python3
BIN := .venv/bin
# Two processes of one thread each use two cores best, and give the same numbers everywhere.
PYTEST_PROCESSES ?= 2
BENCHMARKS ?= steering_cost steering_growth steering_memory replica_memory step_memory host_reads losses_cost vgs_step rollout_speed topk_bias scale
INPUTS := pyproject.toml constraints.txt
HAS_CUDA := import torch, transformers, peft, pytest, hypothesis; assert torch.cuda.is_available()

.PHONY: demo test test-lowest check docs package fmt bench gpu parity third-party families study clean

demo: .venv/examples.stamp
	$(BIN)/python examples/distill_digits.py $(ARGS)

test: check docs package
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_PROCESSES) --dist worksteal $(ARGS)

# The core with the lowest torch and safetensors that pyproject.toml allows, and no extra: make test-lowest PYTHON=python3.10.
# With PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu torch comes without CUDA.
test-lowest:
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --constraint constraints-lowest.txt --editable . hypothesis pytest pytest-xdist
	OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -n $(PYTEST_PROCESSES) --dist worksteal \
	  --ignore steer_optim/plots.py --ignore steer_optim/vlm --doctest-ignore-import-errors $(ARGS)

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/dev.stamp
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site

# The wheel and the sdist, as an index takes them.
package: .venv/dev.stamp
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -q -m package tests/test_package.py

fmt: .venv/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One of them: make bench BENCHMARKS=steering_cost ARGS="--models mlp".
bench: .venv/dev.stamp
	for name in $(BENCHMARKS); do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name $(ARGS) || exit 1; done
	$(BIN)/python -m benchmarks.report

# Less than eight minutes on a GPU of 80 GB, with $(PYTHON) if it has torch with CUDA and the rest, else with .venv.
# TorchJD is left out where it is not installed. python -m benchmarks.report makes tables of the results.
gpu:
	if $(PYTHON) -c '$(HAS_CUDA)' 2>/dev/null; then $(PYTHON) -m benchmarks.gpu $(ARGS); \
	else $(MAKE) .venv/dev.stamp && $(BIN)/python -m benchmarks.gpu $(ARGS); fi

parity: .venv/dev.stamp
	$(BIN)/python -m benchmarks.parity

third-party: .venv/dev.stamp
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[third-party]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m third_party tests/third_party $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.third_party

families: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_PROCESSES) -m "families or not families" tests/vlm/test_families.py $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.families

# The tests of the study's harness, then its page from its table.
study: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_PROCESSES) -m "study or not study" tests/study tests/test_evidence.py $(ARGS)
	$(BIN)/python -m studies.vgs report

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "constraints.txt pins versions that need Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/examples.stamp: .venv/pyvenv.cfg $(INPUTS)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[examples]"
	touch $@

.venv/dev.stamp: .venv/pyvenv.cfg $(INPUTS)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	touch $@ .venv/examples.stamp
