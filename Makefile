# make calibrate   measure this machine's GPU (or CPU) and write thresholds/<device>/<recipe>.yaml
# make verify      measure a sample of the committed tables again: do they still hold here?
# make docs        write what docs/ and README.md show of the program anew, and build the pages in site/
# make figures     draw the README's pictures again, after thresholds/nvidia-h200 has changed
# make test        run the tests, but for the slow ones
# make test-slow   run the slow tests: torchrun, kills, compilers, examples
# make check       ruff, mypy --strict and make test
# make test-torch  run `make test` with another release of torch: make test-torch TORCH=2.14.1
#
# Each creates .venv when missing and installs once. VENV= (empty) uses the current Python and its torch instead.
# TORCH=2.14.1 takes this release and the triton that it asks for, in .venv-torch-2.14.1; all else as in constraints.txt.
# ARGS="..." is passed on: make calibrate ARGS="--grid quick"; make test ARGS="-k lookup".

TORCH ?=
VENV ?= .venv$(TORCH:%=-torch-%)
PYTHON ?= python3

ifeq ($(VENV),)
PY := PYTHONPATH=src $(PYTHON)
INSTALLED :=
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif

FIGURES := docs/figures/nvidia-h200-overview-light.png docs/figures/nvidia-h200-overview-dark.png

.PHONY: calibrate verify docs figures test test-slow test-torch check lint
.DEFAULT_GOAL := check

calibrate: $(INSTALLED)
	$(PY) -m fp8gate calibrate $(ARGS)

verify: $(INSTALLED)
	$(PY) -m fp8gate verify $(ARGS)

docs: $(INSTALLED)
	$(PY) docs/cli.py
	$(PY) docs/schema.py
	$(PY) docs/blocks.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir site

figures: $(INSTALLED)
	$(PY) -m fp8gate report thresholds/nvidia-h200 --out report
	mkdir -p docs/figures
	cp $(FIGURES:docs/figures/%=report/%) docs/figures

test: $(INSTALLED)
	$(PY) -m pytest -m "not slow" $(ARGS)

test-slow: $(INSTALLED)
	$(PY) -m pytest -m slow $(ARGS)

test-torch:
	@test -n "$(TORCH)" || { echo "which release? make test-torch TORCH=2.14.1" >&2; exit 2; }
	$(MAKE) test TORCH=$(TORCH)

check: lint test

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	sed -E -e '$(TORCH:%=s/^torch==.*/torch==%/;/^triton==/d)' constraints.txt > $(VENV)/constraints.txt
	$(VENV)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[calibrate,dev]"
	-$(VENV)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[examples]"
	-$(VENV)/bin/python -m pip install --quiet --no-deps torchtitan==0.3.0
	touch $@
