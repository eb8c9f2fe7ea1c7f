# `make demo` and `make test` need Python 3.11 or newer and nothing else: both install the tested packages of
# requirements.lock, checked by hash, into .venv (about 7 GB; only once). A set-up that was cut short starts afresh.
# uv does the installing, itself taken from the lock: behind a mirror set UV_DEFAULT_INDEX, for it does not read pip.conf.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
UV := $(BIN)/uv

.PHONY: help demo test test-long study lock clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    set up, then search a small generated collection'
	@echo 'make test    set up, then lint, type-check and test'
	@echo 'make test-long  the same and what takes up to an hour: 125 kills, 1,000 mutations, a soak, every guard removed once'
	@echo 'make study   set up, then measure what the frame loss and the selectors bring (up to an hour; docs/STUDY.md)'
	@echo 'make lock    fit requirements.lock to pyproject.toml (UPGRADE=1: take the newest versions)'
	@echo 'make clean   remove .venv and the caches'
	@echo
	@echo 'PYTHON=/path/to/python3.12 chooses the interpreter (after a make clean).'

demo: .venv/.project
	$(BIN)/fineco demo

test: .venv/.project
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-long: test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m long

study: .venv/.project
	$(BIN)/python benchmarks/noise_share.py

# The stamps are touched last, so a killed set-up leaves none and --clear empties what it left.
.venv/.packages: requirements.lock
	@python='$(PYTHON)'; \
	[ -n "$$python" ] || { echo 'error: no Python 3.11 or newer among python3.13, python3.12, python3.11 and python3.' \
		'Install one, or name it: make PYTHON=/path/to/python3.12' >&2; exit 1; }; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$python does not run or is older" \
		'than Python 3.11. Name another: make PYTHON=/path/to/python3.12' >&2; exit 1; }; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $$python cannot make virtual environments." \
		'On Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }; \
	echo "setting up .venv with $$python"; \
	"$$python" -m venv --clear .venv
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > .venv/uv.lock
	$(BIN)/python -m pip install --quiet --no-deps --only-binary :all: --require-hashes -r .venv/uv.lock
	$(UV) pip install --python $(BIN)/python --only-binary :all: --require-hashes -r requirements.lock
	@touch $@

.venv/.project: .venv/.packages pyproject.toml
	$(UV) pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# One file for every platform and Python: exact versions and hashes, no address of an index and no path of this machine.
lock: .venv/.packages
	$(UV) pip compile pyproject.toml --extra dev --universal --fork-strategy fewest --generate-hashes --no-config \
		--no-header --no-emit-index-url $(if $(UPGRADE),--upgrade) --quiet --output-file requirements.lock

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
