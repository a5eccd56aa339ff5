# `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install browser demo test lint docs clean

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

browser:  # the tests of the demo drive Debian's Chromium; without it they are skipped
	command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || echo "no chromium: browser tests are skipped"

test: lint browser
	$(BIN)/python -m pytest

docs: install  # a site in build/site; a dead link is an error
	$(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
