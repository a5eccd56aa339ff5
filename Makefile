# `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
comma := ,

.PHONY: install browser demo test coverage mutation torture soak audit bench bench-full lint docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py --output outputs

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --exclude tests .
	$(BIN)/mypy
	$(BIN)/detect-secrets-hook --no-verify --baseline .secrets.baseline $$(git ls-files '*.py' '*.md' '*.toml' '*.txt' Makefile)

browser:  # the tests of the demo drive Debian's Chromium; without it they are skipped
	command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || echo "no chromium: browser tests are skipped"

# workers of one thread each: threads of several would wait for each other
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: lint browser
	$(PYTEST)

# the test left out limits the size of files, which coverage's own are, too
coverage: install browser
	$(PYTEST) --cov --cov-report= --deselect \
		tests/test_cli.py::test_a_full_disk_and_a_folder_that_cannot_be_written
	$(BIN)/python -m torture.covered

mutation: install  # mutants of four files that the tests must notice; goes on where it was stopped
	$(BIN)/mutmut run --max-children 2
	$(BIN)/mutmut results

docs: install  # a site in build/site; a dead link is an error
	$(BIN)/mkdocs build --quiet

MINUTES ?= 60
SEED ?= 0

torture: install  # generated inputs and kills; goes on where it was stopped
	$(BIN)/python -m torture.fuzz --count 20000 --seed $(SEED) --minutes $(MINUTES)
	$(BIN)/python -m torture.faults --kills 200 --seed $(SEED) --minutes $(MINUTES)

soak: install
	$(BIN)/python -m torture.soak --minutes $(MINUTES)

AUDIT := $(VENV)-audit

# asks an online list of known weaknesses; what can't be looked up is an error, but for WHERE_REACHED=1
audit:
	$(PYTHON) -m venv $(AUDIT)
	-$(AUDIT)/bin/python -m pip install -q pip-audit==2.10.1
	$(AUDIT)/bin/python torture/audited.py constraints.txt $(if $(WHERE_REACHED),--where-reached)

# JANSPIRY, GUIDED: checkouts of the peers; without them, against diffusers only
PEERS = $(if $(JANSPIRY),--janspiry $(JANSPIRY)) $(if $(GUIDED),--guided-diffusion $(GUIDED))

bench: install
	mkdir -p outputs
	$(BIN)/python benchmarks/peers.py $(PEERS) --networks '64 pixels, 64 wide' --output outputs/peers.json
	$(BIN)/python benchmarks/speed.py --rounds 5 --output outputs/speed.json

# DATA: folder with validation-*.parquet, for the curve of quality against evaluations and the data path
bench-full: install
	mkdir -p outputs
	$(BIN)/python benchmarks/peers.py $(PEERS) --rounds 15 --output outputs/peers.json
	$(BIN)/python benchmarks/speed.py --rounds 15 --only sample,large,cold,memory$(if $(DATA),$(comma)data --data $(DATA)) \
		--output outputs/speed.json
	$(if $(DATA),$(BIN)/python benchmarks/solvers.py --data $(DATA) --output outputs/solvers.json --table)

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
