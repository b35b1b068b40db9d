# The verbs of the house. `make demo` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
VLLM_VENV ?= .vllm-venv
TRL_VENV ?= .trl-venv
EXTRAS := dev

.PHONY: help install demo vllm demo-vllm test check format bench chaos faults mutants matrix trl clean

help:
	@echo "make demo     install into $(VENV) and run the main job: a small model learns through the fleet"
	@echo "make test     install and run the tests"
	@echo "make check    ruff, mypy strict, pyright, import-linter, container files"
	@echo "make format   format the code"
	@echo "make bench    the path benchmark against raw redis-py"
	@echo "make chaos    random faults for SECONDS (60) from SEED (1), judged by an oracle"
	@echo "make faults   every fault of the matrix once; rewrites the table in docs/reliability.md"
	@echo "make mutants  a planted bug for every promise: the oracle must catch them all"
	@echo "make vllm     a real vLLM on this machine's CPUs (3.5 GB), and the client's tests against it"
	@echo "make demo-vllm  the demo on two real vLLM servers: one is killed, another registered"
	@echo "make trl      TRL's own trainer on a fleet, in $(TRL_VENV): killed, resumed, counted"
	@echo "make matrix   the core's tests on other servers and redis-py releases"

# pip reads the user's own settings (pip.conf, PIP_INDEX_URL, ...): choose a CPU or CUDA build there.
$(BIN)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade --constraint $(CONSTRAINTS) "pip>=23"
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $@

install: $(BIN)/.installed

demo: install
	$(BIN)/rollfleet demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/hadolint worker/Dockerfile deploy/demo.Dockerfile

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks.path

chaos: SECONDS = 60
chaos: SEED = 1
chaos: install
	$(BIN)/python -m chaos run --seconds $(SECONDS) --seed $(SEED) --json chaos.json

faults: install
	$(BIN)/python -m chaos faults --json faults.json --table docs/reliability.md

mutants: install
	$(BIN)/python -m chaos mutants

matrix: install
	$(BIN)/python -m tests.matrix --cache .matrix

# A vLLM has an environment of its own: it pins hundreds of packages. The second run finds it there.
$(VLLM_VENV)/vllm.json: tests/vllm/install.py
	$(PYTHON) tests/vllm/install.py $(VLLM_VENV)
	touch $@

vllm: install $(VLLM_VENV)/vllm.json
	$(BIN)/python tests/vllm/run.py --vllm $(VLLM_VENV)/bin/vllm

demo-vllm: install $(VLLM_VENV)/vllm.json
	$(BIN)/rollfleet demo --engine vllm --vllm $(VLLM_VENV)/bin/vllm --servers 2 --kill-server-at 5

# An environment of its own: the suite need not carry transformers, datasets and all that is theirs.
$(TRL_VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) -e ".[dev,trl]" "trl==1.16.0"
	touch $@

trl: $(TRL_VENV)/.installed
	$(TRL_VENV)/bin/python -m pytest tests/producer/adapters/test_trl_trainer.py tests/producer/adapters/test_trl.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
