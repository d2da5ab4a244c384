# Every target sets up what it needs in a virtual environment of its own.
#
#   make quickstart   train a federated model on real data
#   make test         run the tests, of products of cases a part that covers them
#   make test-core    run what depends on the version of JAX
#   make test-docs    run the examples of docstrings, of the documentation's pages, and of examples/
#   make test-all     run every case of every test
#   make test-beam    run the tests of plans on Apache Beam, in an environment of its own
#   make test-flower  run the tests of plans and learners on Flower, in an environment of its own
#   make test-other-jax  run saved plans on clients with another version of JAX: OTHER=its Python
#   make mutants      change the code in small ways, and count the changes that no test notices
#   make coverage     run the tests, and say which lines of fax they do not reach
#   make check        lint, format and types
#   make docs         build the documentation, and check its links and pages
#   make browse       look at the documentation in a browser without a window
#   make pages        generate the drawing of the house and the list of public names
#   make figures      run the pages that draw figures, and keep these
#   make package      build the sdist and the wheel, and test the wheel in a new environment
#   make checks       check, docs, test-docs and package, at the same time
#   make bench        simulate with fax and with its peers, in less than 25 minutes
#   make bench-core   measure fax's operators against DrJAX and a hand-written vmap
#   make bench-scaling  measure how fax scales with devices
#   make bench-tasks  measure training and evaluation of the benchmark models
#   make bench-algorithms  measure what algorithms and aggregators cost
#   make bench-tpu    estimate rounds on TPUs with their compiler, without a TPU, in 15 minutes
#   make bench-data-center  estimate what training sends between slices of a data center, without a TPU
#   make bench-beam   measure pipelines of Apache Beam with up to a million clients
#   make bench-gpu    measure rounds on this machine's GPU, in less than 9 minutes
#   make clean        remove the environments and what was built
#
# PYTHON chooses the interpreter, VENV the environment, and JAX the version, as in
#   make test PYTHON=python3.11 VENV=.venv-3.11 JAX=jax==0.10.2

PYTHON ?= python3
VENV ?= .venv
JAX ?= jax
BIN := $(VENV)/bin
# Python compiles modules when they are first imported. Most of what is installed never is.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
WITH := $(subst =,-,$(JAX))
# The newest JAX's tests also compile for TPUs.
TPU := $(if $(filter jax,$(JAX)),$(VENV)/tpu.$(WITH))

# The tests start many processes, which need not all compile the same modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart environment test test-core test-docs test-all test-other-jax test-beam test-flower checks coverage mutants check docs browse pages figures package bench bench-core bench-scaling bench-tasks bench-algorithms bench-tpu bench-data-center bench-beam bench-gpu clean

quickstart: $(VENV)/experiment.$(WITH)
	$(BIN)/fax run digits

# Only installs what the targets of these names need, all at once: make environment EXTRAS=docs,test
EXTRAS ?= test
environment: $(VENV)/$(EXTRAS).$(WITH)

test: $(VENV)/test.$(WITH) $(TPU)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-core: $(VENV)/test.$(WITH) $(TPU)
	$(BIN)/python -m pytest --core -n auto --dist worksteal

test-docs: $(VENV)/test.$(WITH)
	$(BIN)/python -m pytest --docs -n auto --dist worksteal $$(grep -l "pytest.mark.docs" tests/test_*.py)

test-all: $(VENV)/test.$(WITH) $(TPU)
	$(BIN)/python -m pytest --all -n auto --dist worksteal

# Where Beam cannot be installed, its tests are skipped.
test-beam:
	@if $(MAKE) environment VENV=$(VENV)-beam EXTRAS=test-beam; then \
	$(VENV)-beam/bin/python -m pytest tests/test_deploy_beam.py; \
	else echo "apache-beam cannot be installed, so tests/test_deploy_beam.py is skipped."; fi

# Where Flower cannot be installed, its tests are skipped. For all of them: make test-flower FLOWER=
FLOWER ?= -m "not long"
test-flower:
	@if $(MAKE) environment VENV=$(VENV)-flower EXTRAS=test-flower; then \
	$(VENV)-flower/bin/python -m pytest tests/test_flower.py tests/test_flower_learners.py $(FLOWER) -n 2; \
	else echo "flwr cannot be installed, so the tests of plans and learners on it are skipped."; fi

test-other-jax: $(VENV)/test.$(WITH)
	$(BIN)/python tests/other_jax.py $(OTHER)

# This takes hours. For a smaller sample: make mutants MUTANTS="--sample 20"
mutants: $(VENV)/test.$(WITH)
	$(BIN)/python tests/mutants.py aggregators $(MUTANTS)
	$(BIN)/python tests/mutants.py operators $(MUTANTS)
	$(BIN)/python tests/mutants.py primitives $(MUTANTS)
	$(BIN)/python tests/mutants.py lowering $(MUTANTS)

coverage: $(VENV)/test.$(WITH) $(TPU)
	$(BIN)/python -m pytest -n auto --dist worksteal --cov fax --cov-report term-missing:skip-covered

# The last line fails if the type of a public name is not known in full.
check: $(VENV)/check.$(WITH)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(BIN):$$PATH" basedpyright --verifytypes fax --ignoreexternal

docs: $(VENV)/docs.$(WITH)
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html
	$(BIN)/python tools/check_site.py docs/_build/html

# This downloads a Chromium, unless CHROMIUM names one: make browse CHROMIUM=/usr/bin/chromium
browse: docs $(VENV)/browse.$(WITH)
	$(if $(CHROMIUM),,$(BIN)/playwright install chromium)
	$(if $(CHROMIUM),CHROMIUM=$(CHROMIUM)) $(BIN)/python tools/browse_site.py docs/_build/html

# Mostly, each of these uses one core. Their output comes one after another, if make can do that.
checks: $(VENV)/check.$(WITH) $(VENV)/docs.$(WITH) $(VENV)/test.$(WITH)
	$(MAKE) -j $(if $(filter output-sync,$(.FEATURES)),--output-sync) check docs package test-docs

pages:
	$(PYTHON) tools/house.py
	$(PYTHON) tools/api.py

figures: $(VENV)/test.$(WITH)
	$(BIN)/python tools/figures.py

package: $(VENV)/test.$(WITH)
	.ci/package $(PYTHON) $(VENV)

# Needs nothing but a Python: every peer gets an environment of its own.
bench:
	$(PYTHON) benchmarks/simulation.py

bench-core: $(VENV)/bench.$(WITH)
	$(BIN)/python benchmarks/core.py

bench-scaling: $(VENV)/bench.$(WITH)
	$(BIN)/python benchmarks/scaling.py

bench-tasks: $(VENV)/bench.$(WITH)
	$(BIN)/python benchmarks/tasks.py

bench-algorithms: $(VENV)/bench.$(WITH)
	$(BIN)/python benchmarks/algorithms.py

# What has been compiled is kept, and not compiled again.
bench-tpu: $(VENV)/bench.$(WITH) $(VENV)/tpu.$(WITH)
	mkdir -p runs
	$(BIN)/python benchmarks/tpu.py --json runs/tpu.json --figure runs/tpu.png

# For all models and numbers of slices: make bench-data-center DATA_CENTER=--all
bench-data-center: $(VENV)/bench.$(WITH) $(VENV)/tpu.$(WITH)
	mkdir -p runs
	$(BIN)/python benchmarks/data_center.py --json runs/data_center.json --figure runs/data_center.png $(DATA_CENTER)

bench-beam:
	$(MAKE) environment VENV=$(VENV)-beam EXTRAS=test-beam
	$(VENV)-beam/bin/python benchmarks/beam.py

# For example: make bench-gpu JAX="jax[cuda13]"
bench-gpu: $(VENV)/bench.$(WITH)
	$(BIN)/python benchmarks/gpu.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip

# A stamp for each extra and version of JAX, made anew when the requirements change. Several extras
# are separated by commas.
comma := ,
$(VENV)/%.$(WITH): pyproject.toml | $(VENV)/bin/python
	$(INSTALL) --editable ".[$*]" "$(JAX)"
	@touch $@ $(patsubst %,$(VENV)/%.$(WITH),$(subst $(comma), ,$*))

# Where the TPU compiler cannot be installed, its tests are skipped, and the next run tries again.
$(VENV)/tpu.$(WITH): pyproject.toml | $(VENV)/test.$(WITH)
	@if $(INSTALL) --editable ".[tpu]" "$(JAX)"; then touch $@; \
	else echo "libtpu cannot be installed, so tests/test_tpu.py is skipped."; fi

clean:
	rm -rf .venv* build dist docs/_build runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
