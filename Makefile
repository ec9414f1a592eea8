# make demo: the main job on an embedded data set, no GPU needed.   make test: every test that needs no GPU.
# make lint: style and types, in seconds.
PYTHON ?= python3
CUDA ?= cuda13
BIN := .venv/bin

.PHONY: demo lint test test-slow fuzz soak gpu gpu-first results
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

# Mutated inputs of every kind; what fails is kept in tests/fuzz and tried first from then on.
FUZZ ?= 10000
fuzz: .venv/done
	CUDA_VISIBLE_DEVICES= FASTDISCO_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/test_fuzz.py -q -rs -n auto

# Faults in random order (docs/reliability.md).  It goes on where it stopped: make soak MINUTES=30 STATE=/var/tmp/soak
MINUTES ?= 60
FAULTS ?= 1000
SEED ?= 0
STATE ?= out/soak
soak: .venv/done
	$(BIN)/python bench/soak.py --state $(STATE) --minutes $(MINUTES) --faults $(FAULTS) --seed $(SEED)

# make gpu-first: the order for the first half hour on a GPU.
# make gpu PART=kernels: one part, tests or a bench, each under 9 minutes by estimate (docs/speed.md).  RUN=python3 takes that Python as it is.
RUN ?= $(BIN)/python
PARTS := kernels loader step train engine kernels-bench loader-bench step-bench engine-bench testbeds-1 testbeds-2
tests-kernels := tests/test_kernels.py tests/test_triton.py
tests-loader := tests/test_data.py tests/test_shards.py tests/test_placement.py
tests-step := tests/test_step.py tests/test_graphs.py
tests-train := tests/test_gpu_step.py tests/test_train.py tests/test_snapshot.py tests/test_cache.py tests/test_throughput.py
tests-engine := tests/test_engine.py tests/test_exchange.py tests/test_methods.py tests/test_models.py tests/test_eval_frozen.py
bench-kernels-bench := kernels.py --minutes 7
bench-loader-bench := loader.py
bench-step-bench := throughput.py --minutes 4 --batch 256
bench-engine-bench := engine.py
bench-testbeds-1 := testbeds.py --only moco_mobv3 moco_effb0 moco_effb1 moco_r18 moco_r34 moco_vit_tiny
bench-testbeds-2 := testbeds.py --only moco_xcit_tiny seed_mobv3 swav_mobv3 dino_vit_tiny dino_xcit_tiny
ready := $(if $(filter $(BIN)/python,$(RUN)),.venv/done)
gpu: $(ready)
	@test -n "$(filter $(PARTS),$(PART))" || { echo "make gpu PART=... with one of: $(PARTS)"; exit $(if $(PART),2,0); }
	$(if $(tests-$(PART)),$(RUN) -m pytest $(tests-$(PART)) -m gpu -rs)
	$(if $(bench-$(PART)),$(RUN) bench/$(bench-$(PART)))

gpu-first: $(ready)
	$(RUN) bench/first.py

# What is made from the JSON files in bench/results: the tables of README and docs, and the pictures.
results: .venv/done
	$(BIN)/python bench/report.py

.venv/done: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[$(CUDA),dev]'
	touch $@
