# make run: the whole demo, from nothing to a report. make test: all checks and tests.
PYTHON ?= python3
IN_VENV = .venv/bin/python -m
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: run test setup browser schema

run: setup
	$(IN_VENV) snakemake --profile stages/profiles/local
	@cat results/summary.txt

test: setup browser
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy
	$(IN_VENV) pytest

setup:
	@PYTHON="$(PYTHON)" sh stages/install.sh

browser:
	@sh tests/install_browser.sh

schema: setup
	$(IN_VENV) pact_offline.settings.workflow stages/config.schema.yaml
	$(IN_VENV) pact_offline.evaluation.metrics docs/metrics.schema.json
