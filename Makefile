# Two commands matter: `make serve` and `make test`. Flags of the server go through ARGS, of pip through PIP_FLAGS.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
PIP_FLAGS ?=

BIN    := $(VENV)/bin
# transformers sees the local folder only: nothing that these targets run looks up a model hub.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
BASE    = $$($(BIN)/python -m examples.intent_router.base_model)

.PHONY: serve test lint integration clean

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

test: lint
	$(OFFLINE) $(BIN)/pytest -m 'not integration' $(ARGS)

# The real model and a real server process: minutes, and 98 MB on the first run.
integration: $(VENV)/.installed-dev
	@base=$(BASE) && $(OFFLINE) SCALABL_EXAMPLE_BASE="$$base" $(BIN)/pytest -m integration $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
