# make demo | test | test-all | test-cuda | lint | clean; everything runs in .venv, made on first use, which gets no more than a target needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -e
IN_TESTS := --explicit-package-bases --allow-untyped-defs --check-untyped-defs --no-warn-unused-ignores \
	$(addprefix --disable-error-code=,union-attr arg-type operator index func-returns-value misc assignment list-item \
	call-overload var-annotated str-unpack has-type dict-item)

.PHONY: demo test test-all test-cuda lint clean

.venv/run: setup.cfg
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) .
	touch $@

.venv/test .venv/lint: .venv/%: .venv/run
	$(PIP) '.[$*]'
	touch $@

demo: .venv/run
	@test -d record/demo || $(BIN)/python record_scripts/make_record.py --save_folder_name demo --image_size 16 --patch_size 3
	$(BIN)/python defense/fmp.py --result_file demo --yaml_path ./config/defense/fmp/digits.yaml

test: .venv/test
	$(BIN)/python -m pytest

test-all: .venv/test
	$(BIN)/python -m pytest -m "" --cov=defense --cov-report=term-missing:skip-covered --cov-fail-under=90

test-cuda:
	@$(PYTHON) record_scripts/check_cuda.py --probe
	@$(MAKE) --no-print-directory .venv/test
	$(BIN)/python record_scripts/check_cuda.py

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=tests $(BIN)/mypy $(IN_TESTS) tests  # names and arguments only, also of tests that seldom run
	$(BIN)/lint-imports

clean:
	rm -rf .venv record/demo data/digits cuda_check
