# make demo   sets up, and runs the main job on real film reviews: 8 to 10 minutes on two cores
# make test   sets up, and runs the tests
# make soak   kills runs at random instants and compares what they come to: under 30 minutes on two quiet cores
# make check  sets up, and runs the formatter, the linter and the type checker
# make clean  removes what the others made; your runs stay

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test soak check clean

# Made anew when what it is made from has changed; the stamp comes last, so half an installation is none.
.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/.demo-stamp: .venv/.stamp requirements-demo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-demo.txt
	touch $@

demo: .venv/.demo-stamp
	HF_HUB_OFFLINE=1 $(BIN)/python -m distill demo

test: .venv/.stamp
	$(BIN)/python -m pytest -q -n 2 --cov --cov-report=term

soak: .venv/.stamp
	$(BIN)/python tests/soak.py

check: .venv/.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
