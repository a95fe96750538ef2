# Two commands matter: `make serve` and `make test`. Flags of the server go through ARGS, of pip through PIP_FLAGS.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
PIP_FLAGS ?=

BIN    := $(VENV)/bin
# transformers sees the local folder only: nothing that these targets run looks up a model hub.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
BASE    = $$($(BIN)/python -m examples.intent_router.base_model)

.PHONY: serve models test lint kernel-report check-kernel deploy-check integration integration-vllm soak bench lock clean

# One environment; what serving needs comes first, what testing needs on top when it is asked for.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[$*]'
	@touch $@

serve: $(VENV)/.installed-gguf
	@base=$(BASE) && $(OFFLINE) exec $(BIN)/scalabl serve --model "$$base" --adapter examples/intent_router/adapter \
		--adapter-name intent-router $(ARGS)

# The example's base model and adapter, laid out as the image and the manifests expect them.
models: $(VENV)/.installed-gguf
	$(OFFLINE) $(BIN)/python -m examples.intent_router.base_model models/base
	mkdir -p models/adapters/intent-router
	cp examples/intent_router/adapter/* models/adapters/intent-router/

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# Twice: as it runs on a CPU, and the Triton kernel in Triton's interpreter, which must be set before it is imported.
test: lint
	$(OFFLINE) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -m 'fused and not integration and not soak' $(ARGS)
	$(OFFLINE) $(BIN)/pytest -m 'not fused and not integration and not soak' $(ARGS)

# Compiles the Triton kernel for GPUs that are not here; fails on a spill, a missing matrix instruction or a ceiling.
kernel-report: $(VENV)/.installed-dev
	$(BIN)/python -m scalabl_kernels.tools.report --check

# The kernel's tests under a checker of memory: reads and writes out of bounds, and races. A young tool: pinned, and a job
# of its own. It asks for Python 3.12 and runs on 3.11.
check-kernel: $(VENV)/.installed-dev
	@test -d $(VENV)/ttsem || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--ignore-requires-python --target $(VENV)/ttsem ttsem==0.1.0
	SCALABL_FUSED_ON_CPU=1 TRITON_DEFAULT_FP_FUSION=1 PYTHONPATH=$(VENV)/ttsem \
		$(BIN)/python -m ttsem.sanitize pytest tests/kernels/test_fused.py $(ARGS)

# What checks Dockerfile, compose file and manifests. npm brings schemas; without it what needs them is skipped, and says so.
$(VENV)/.installed-deploy: deploy/tools/requirements.txt deploy/tools/package-lock.json $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --require-hashes -r deploy/tools/requirements.txt
	@mkdir -p $(VENV)/npm && cp deploy/tools/package.json deploy/tools/package-lock.json $(VENV)/npm
	@npm ci --prefix $(VENV)/npm --silent --no-audit --no-fund --ignore-scripts || \
		echo 'npm could not bring the schemas of custom kinds and of the compose file: they are not checked'
	@touch $@

# Lints the Dockerfile, renders each overlay and validates it on the last four Kubernetes minors and against policies.
deploy-check: $(VENV)/.installed-deploy
	$(BIN)/pytest tests/deploy $(ARGS)

# The requirement files with their hashes, after a change of pyproject.toml, constraints.txt or deploy/tools.
lock: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	UV=$(BIN)/uv $(BIN)/python docker/lock.py
	$(BIN)/uv pip compile deploy/tools/requirements.in --constraint constraints.txt --python-version 3.11 --universal \
		--generate-hashes --no-header --no-annotate --quiet --output-file deploy/tools/requirements.txt
	npm install --prefix deploy/tools --package-lock-only --omit-lockfile-registry-resolved --silent --no-audit --no-fund

# The real model and a real server process: minutes, and 98 MB on the first run.
integration: $(VENV)/.installed-dev
	@base=$(BASE) && $(OFFLINE) SCALABL_EXAMPLE_BASE="$$base" $(BIN)/pytest -m integration $(ARGS)

# vLLM for CPUs in a virtual environment of its own (2 GB, made once), and the vLLM engine before it; SCALABL_VLLM_QUERIES=20 is
# a shorter comparison.
VLLM ?= build/vllm
$(VLLM)/.installed: tests/integration/support/vllm_environment.py $(VENV)/.installed-dev
	$(BIN)/python -m tests.integration.support.vllm_environment $(VLLM)
	@touch $@

integration-vllm: $(VENV)/.installed-dev $(VLLM)/.installed
	@base=$(BASE) && $(OFFLINE) SCALABL_EXAMPLE_BASE="$$base" SCALABL_VLLM_PYTHON="$(abspath $(VLLM))/bin/python" \
		$(BIN)/pytest -s -m vllm tests/integration/serving/test_vllm.py $(ARGS)

# An hour at 80% of capacity; SOAK_SECONDS=300 shortens it.
soak: $(VENV)/.installed-dev
	$(OFFLINE) $(BIN)/pytest -s -m soak tests/integration/serving/test_soak.py $(ARGS)

# What K samples cost, beside a loop over them and PEFT: hours in full; ARGS='--only brute --prompts medium --samples 10' is one
# table, and --vllm-python build/vllm/bin/python adds K requests to the vLLM of `make integration-vllm`. On a machine that does
# nothing else.
bench: $(VENV)/.installed-dev
	@base=$(BASE) && $(OFFLINE) $(BIN)/python -m benchmarks.serving --model "$$base" --output build/bench $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
