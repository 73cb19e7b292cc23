# make demo | test | lint | clean; everything runs in .venv, made on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

demo: .venv/ready
	@test -d record/badnet_digits || $(BIN)/python record_scripts/make_record.py
	$(BIN)/python defense/fmp.py --result_file badnet_digits --yaml_path ./config/defense/fmp/digits.yaml
	@echo "the report: $(CURDIR)/record/badnet_digits/defense/fmp/report.html"
	@echo "pictures: $(CURDIR)/record/badnet_digits/defense/fmp/acc_like_metric_plots.png and loss_metric_plots.png"

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv record/badnet_digits data/digits
