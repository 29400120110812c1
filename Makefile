# make demo, make test: all that is needed is Python 3.11 or newer, make and a package index.
PYTHON ?= python3
READY := .venv/.installed

.PHONY: demo test fast cluster slow coverage lint docs bench-report soak mutation audit sbom clean

demo: $(READY)
	.venv/bin/raydeep search jobs/digits.yaml

test: fast cluster

# By files, on all cores: tests of a file share what is costly to make.
fast: $(READY)
	.venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile

cluster: $(READY)
	.venv/bin/python -m pytest -m "cluster and not slow"

slow: $(READY)
	.venv/bin/python -m pytest -m slow

# Of the fast tests: what runs in Ray's workers is measured by `make cluster` alone, in other processes.
coverage: $(READY)
	.venv/bin/coverage erase
	.venv/bin/coverage run -m pytest
	.venv/bin/coverage combine --quiet
	@mkdir -p dist
	.venv/bin/coverage json --quiet -o dist/coverage.json
	.venv/bin/python tests/coverage_table.py dist/coverage.json

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

bench-report: $(READY)
	.venv/bin/python benchmarks/report.py

soak: $(READY)
	.venv/bin/python benchmarks/soak.py

mutation: $(READY)
	.venv/bin/uv pip install --quiet --python .venv/bin/python -e '.[mutation]' -c constraints.txt
	.venv/bin/mutmut run --max-children 2
	.venv/bin/python tests/mutation/report.py

audit: $(READY)
	.venv/bin/python .ci/audit.py

sbom: $(READY)
	@mkdir -p dist
	.venv/bin/uv tool run --quiet --constraints .ci/tools.txt --from cyclonedx-bom cyclonedx-py environment \
		.venv/bin/python --pyproject pyproject.toml --of JSON -o dist/sbom.cdx.json
	.venv/bin/python .ci/licences.py dist/sbom.cdx.json

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "raydeep needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing into .venv (once; torch and Ray: about 6 GB, 1 to 3 minutes)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv -c constraints.txt
	.venv/bin/uv pip install --quiet --python .venv/bin/python --compile-bytecode -e '.[dev]' -c constraints.txt
	@touch $(READY)

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis mutants
