# make demo: a model forgets four people, loses a quarter of its layers, heals, and is judged. make test: what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/forget-and-shrink

.PHONY: demo test test-slow federated-test check bench large docs reproduce comparisons clean

demo: $(VENV)/installed
	$(BIN)/overhaul run recipes/forget-and-shrink.yaml -o $(RUN)

test: $(VENV)/installed-dev check
	$(BIN)/pytest -n 2 --dist loadfile  # a file's models are made once

# what takes minutes: several processes in every way, starters trained again, memory of whole runs
test-slow: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile -m slow --ignore tests/parties/test_flower_server.py

# parties under Flower's own server: minutes, most of them spent waiting for processes to start
federated-test: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r docs/federated/requirements.lock
	$(BIN)/pytest -m slow tests/parties/test_flower_server.py

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks

large: $(VENV)/installed
	$(BIN)/python benchmarks/large.py

reproduce: $(VENV)/installed
	$(BIN)/overhaul reproduce all

comparisons: $(VENV)/installed
	$(BIN)/python docs/compare.py

docs: $(VENV)/installed
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/draw.py

# torch first, at its pinned version: resolving it together with the rest may pick a build for other hardware
$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.lock requirements-federated.lock requirements-eval.lock requirements-scale.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-federated.lock \
		-r requirements-eval.lock -r requirements-scale.lock
	touch $@

clean:
	rm -rf $(VENV) runs build dist
