# make demo    the main job, from nothing: an environment, five networks on digits, the leaderboard
# make test    the tests          make check   lint, types, contract
# make gpu     what needs CUDA, skipped aloud without it
# make bench   the benchmarks     make clean   takes away what these made, the environment too
PYTHON ?= python3
BIN := .venv/bin
# The tests hold bits against bits: the same number of threads everywhere.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test gpu check bench clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "fatbench needs Python 3.11 or newer: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/ready
	$(BIN)/fatbench demo --out demo

# A file at a time on each core, one thread each.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses auto --dist loadfile

gpu: .venv/ready
	$(BIN)/pytest -q -m gpu -rs

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=. $(BIN)/mypy fatbench defenses evaluations
	$(BIN)/fatbench check

bench: .venv/ready
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache
