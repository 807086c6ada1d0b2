PYTHON ?= .venv/bin/python

.PHONY: check test coverage torture slow clean

check:  ## format, lint, import arrow, types: what CI and pre-commit share
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -n 2

coverage:
	$(PYTHON) -m pytest --cov --cov-report=term-missing

torture:  ## faults, hostile files, odd numbers and repeats, at full length: five minutes
	$(PYTHON) -m benchmarks.torture --out benchmarks/torture/results

slow:  ## the minutes-long tests too
	$(PYTHON) -m pytest -m "slow or not slow"

clean:
	rm -rf build dist .coverage .mypy_cache .pytest_cache .ruff_cache
