# make serve   serve the bundle that ships with the package, at port 8000
# make test    install what the tests need, torch included, and run all of them, in two processes
# make lint    ruff and mypy
# make bench   this service, its floor and five other servers in turns: 10 minutes, as recorded; FULL=1: an hour, more loads
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP := .venv/bin/pip --disable-pip-version-check --quiet
# The GPU runtime where an NVIDIA GPU is seen, the CPU runtime otherwise.
SERVE := $(if $(shell nvidia-smi -L 2>/dev/null),serve-gpu,serve)

.PHONY: serve test lint bench clean

serve: .venv/serve.installed
	.venv/bin/ride-serve

test: .venv/test.installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/lint.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/bench.installed
	.venv/bin/python -m benchmarks.serving $(if $(FULL),--full)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/serve.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e '.[$(SERVE)]'
	@touch $@

.venv/test.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e '.[$(SERVE),train,export,test]'
	@touch $@

.venv/lint.installed: .venv/test.installed
	$(PIP) install -c constraints.txt -e '.[lint]'
	@touch $@

.venv/bench.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt -e '.[$(SERVE),export,bench]'
	@touch $@

clean:
	rm -rf .venv benchmarks/.venvs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
