# make demo: the main job on an embedded data set, no GPU needed.   make test: every test that needs no GPU.
# make lint: style and types, in seconds.
PYTHON ?= python3
CUDA ?= cuda13
BIN := .venv/bin

.PHONY: demo lint test test-slow gpu results
demo: .venv/done
	$(BIN)/python bench/demo.py --seeds 0 --out out/demo

lint: .venv/done
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyrefly check

# No test here may depend on what GPU the machine has: it is hidden.  A worker a core, which take over from one another.
test: .venv/done
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest tests -m "not slow" -rs -n auto --dist worksteal

test-slow: .venv/done
	$(BIN)/python -m pytest tests -m slow -rs

# make gpu PART=kernels: the tests and benches of a part that need a GPU, each part under 9 minutes; RUN=python3 takes that Python as it is.
RUN ?= $(BIN)/python
PARTS := kernels loader step engine testbeds
kernels := tests/test_kernels.py tests/test_triton.py
loader := tests/test_data.py tests/test_shards.py tests/test_placement.py
step := tests/test_step.py tests/test_graphs.py tests/test_train.py tests/test_cache.py tests/test_throughput.py
engine := tests/test_engine.py tests/test_exchange.py
testbeds := tests/test_methods.py tests/test_models.py
bench-kernels := kernels.py --minutes 5
bench-step := throughput.py --minutes 3 --batch 256
gpu: $(if $(filter $(BIN)/python,$(RUN)),.venv/done)
	@test -n "$(filter $(PARTS),$(PART))" || { echo "make gpu PART=... with one of: $(PARTS)"; exit $(if $(PART),2,0); }
	$(if $(PART),$(RUN) -m pytest $($(PART)) -m gpu -rs)
	$(if $(PART),$(RUN) bench/$(or $(bench-$(PART)),$(PART).py))

# What is made from the JSON files in bench/results: the tables of README and docs, and the pictures.
results: .venv/done
	$(BIN)/python bench/report.py

.venv/done: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[$(CUDA),dev]'
	touch $@
