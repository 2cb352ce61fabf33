# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

MAKEFLAGS += --jobs=2

.PHONY: demo test test-all lint bench docs site setup clean

demo: $(VENV)/.run
	$(BIN)/fluxion demo

TEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: setup
	$(TEST)

test-all: setup
	EXHAUSTIVE=1 $(TEST) -m ""

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup $(VENV)/.bench
	$(BIN)/python -m benchmarks

docs: $(VENV)/.run
	$(BIN)/python docs/site/methods_page.py > docs/methods.md
	mkdir -p build && $(BIN)/python docs/site/public_names.py > build/names && mv build/names adapters/__init__.pyi
	$(BIN)/python docs/site/draw.py

site: setup
	$(BIN)/mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml
	@echo "To read it: $(BIN)/python -m http.server --directory build/site"

clean:
	rm -rf $(VENV) build dist

setup: $(VENV)/.dev $(VENV)/.olah $(VENV)/.browser

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp is renewed only when its install has succeeded, so a broken install is tried again. What is installed is
# compiled by all cores, which pip does not.
$(VENV)/.run: EXTRAS :=
$(VENV)/.dev: EXTRAS := [test,lint]
$(VENV)/.bench: EXTRAS := [test,lint,bench]
$(VENV)/.bench: $(VENV)/.dev
$(VENV)/.run $(VENV)/.dev $(VENV)/.bench: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --no-compile --editable '.$(EXTRAS)'
	@$(BIN)/python -m compileall -qq --workers 0 $(VENV)/lib || true
	@touch $@

# A server of the Hub's protocol that the tests download from. It needs other versions of the libraries used here.
$(VENV)/.olah: $(BIN)/python
	$(PYTHON) -m venv $(VENV)/olah
	$(VENV)/olah/bin/python -m pip --disable-pip-version-check --quiet install olah==0.5.4
	@touch $@

# The browser that the tests open pages in, of Debian. Where it cannot be had, these tests say so and the others run.
$(VENV)/.browser: $(BIN)/python
	-command -v chromium > /dev/null || { apt-get -qq update && apt-get -qq install --yes chromium; }
	@! command -v chromium > /dev/null || touch $@
