# make demo: the main job on an embedded data set, no GPU needed.   make test: every test that needs no GPU.
PYTHON ?= python3
CUDA ?= cuda13
BIN := .venv/bin

.PHONY: demo test test-slow gpu results
demo: .venv/done
	$(BIN)/python bench/demo.py --seeds 0 --out out/demo

test: .venv/done
	$(BIN)/python -m pytest tests -m "not slow" -rs

test-slow: .venv/done
	$(BIN)/python -m pytest tests -m slow -rs

PARTS := data train engine step
gpu: .venv/done  # make gpu PART=data: the tests of a part that need a GPU
	@test -n "$(filter $(PARTS),$(PART))" || { echo "make gpu PART=... with one of: $(PARTS)"; exit 2; }
	$(BIN)/python -m pytest tests/test_$(PART).py -m gpu -rs

results: .venv/done  # the tables of README and docs from bench/results
	$(BIN)/python bench/report.py

.venv/done: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[$(CUDA),dev]'
	touch $@
