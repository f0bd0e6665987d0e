# Everything works from a fresh clone: `make demo` or `make test`. Needs Python >= 3.11 with venv, and make.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin

.PHONY: help demo test test-browser mutants lint lock clean
help:
	@echo "make demo      install, train a few minutes on synthetic images, evaluate, and write a report"
	@echo "make test      install and run the tests"
	@echo "make test-browser  test the web page in chromium (/usr/bin/chromium, or the path in CHROMIUM)"
	@echo "make mutants   break single lines of the source, and check that the test of each one fails"
	@echo "make lint      format, lint and type-check"
	@echo "make lock      resolve the dependencies in pyproject.toml again and write requirements.lock"

.venv/ready: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "dino needs Python 3.11 or newer, which was not found. On Debian: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "Python's venv module is missing. On Debian: apt-get install python3-venv"; exit 1; }
	awk '/^uv==/ {on = 1} on {print} on && !/\\$$/ {exit}' requirements.lock > .venv/uv.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.lock
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: .venv/ready
	rm -rf runs/demo
	$(BIN)/dino train --preset demo --out runs/demo
	$(BIN)/dino eval attention-masks runs/demo small-objects
	$(BIN)/dino attention runs/demo small-objects -o runs/demo/attention
	@echo "Open in a browser:"
	@echo "  $(CURDIR)/runs/demo/report.html         the report of the run"
	@echo "  $(CURDIR)/runs/demo/attention/all.png   attention next to the objects"
	@echo "Search by example, duplicates, clusters, a map, and what each patch attends to, in the browser:"
	@echo "  .venv/bin/dino index runs/demo small-objects -o runs/demo/index"
	@echo "  .venv/bin/dino explore runs/demo/index"

# Bytecode is cached even if the environment disables it: the tests start processes that import torch.
test: .venv/ready
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal -q

test-browser: .venv/ready
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q tests/browser

mutants: .venv/ready
	$(BIN)/python tests/mutants.py

lint: .venv/ready
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/pyright

lock: .venv/ready
	$(BIN)/uv pip compile pyproject.toml --group dev --extra search --extra explore --extra segmentation --universal --generate-hashes --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --python-version 3.11 --quiet --output-file requirements.lock

clean:
	rm -rf .venv
