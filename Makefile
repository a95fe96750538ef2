# Two commands matter: `make serve` and `make test`. Flags of the server go through ARGS, of pip through PIP_FLAGS.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
PIP_FLAGS ?=

BIN    := $(VENV)/bin
# transformers sees the local folder only: nothing that these targets run looks up a model hub.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
BASE    = $$($(BIN)/python -m examples.intent_router.base_model)

.PHONY: serve test lint kernel-report check-kernel integration soak clean

# One environment; what serving needs comes first, what testing needs on top when it is asked for.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[$*]'
	@touch $@

serve: $(VENV)/.installed-gguf
	@base=$(BASE) && $(OFFLINE) exec $(BIN)/scalabl serve --model "$$base" --adapter examples/intent_router/adapter \
		--adapter-name intent-router $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Twice: as it runs on a CPU, and the Triton kernel in Triton's interpreter, which must be set before it is imported.
test: lint
	$(OFFLINE) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -m 'fused and not integration and not soak' $(ARGS)
	$(OFFLINE) $(BIN)/pytest -m 'not fused and not integration and not soak' $(ARGS)

# Compiles the Triton kernel for GPUs that are not here; fails on a spill, a missing matrix instruction or a ceiling.
kernel-report: $(VENV)/.installed-dev
	$(BIN)/python -m kernels.report --check

# The kernel's tests under a checker of memory: reads and writes out of bounds, and races. A young tool: pinned, and a job
# of its own. It asks for Python 3.12 and runs on 3.11.
check-kernel: $(VENV)/.installed-dev
	@test -d $(VENV)/ttsem || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--ignore-requires-python --target $(VENV)/ttsem ttsem==0.1.0
	SCALABL_FUSED_ON_CPU=1 TRITON_DEFAULT_FP_FUSION=1 PYTHONPATH=$(VENV)/ttsem \
		$(BIN)/python -m ttsem.sanitize pytest tests/kernels/test_fused.py $(ARGS)

# The real model and a real server process: minutes, and 98 MB on the first run.
integration: $(VENV)/.installed-dev
	@base=$(BASE) && $(OFFLINE) SCALABL_EXAMPLE_BASE="$$base" $(BIN)/pytest -m integration $(ARGS)

# An hour at 80% of capacity; SOAK_SECONDS=300 shortens it.
soak: $(VENV)/.installed-dev
	$(OFFLINE) $(BIN)/pytest -s -m soak tests/integration/test_soak.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
