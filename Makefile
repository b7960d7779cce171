# Every target works from a fresh clone: the virtual environment is made from the lock files when it is missing or old.
BIN := .venv/bin
INSTALLED := .venv/installed
RUN := manifests/examples/positive-reviews.yaml

.PHONY: demo test check generate format lock clean

demo: $(INSTALLED)  ## The whole chain on this machine: a real model, real reviews
	$(BIN)/rlhf run $(RUN)

test: $(INSTALLED)  ## All tests that need no cluster
	$(BIN)/python -m pytest

check: $(INSTALLED)  ## Format, lint, types, import contracts, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python hack/generate.py --check

generate: $(INSTALLED)  ## Write the CRD from the models
	$(BIN)/python hack/generate.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:  ## Resolve the newest releases that pyproject.toml allows
	.cache/uv/bin/uv pip compile --quiet --upgrade pyproject.toml --extra operator --extra pipeline --extra dev \
	  --python-version 3.12 --no-emit-index-url --no-annotate --generate-hashes -o requirements.lock

clean:
	rm -rf .venv .cache .rlhf

$(INSTALLED): requirements.lock requirements-demo.lock pyproject.toml hack/install.sh
	hack/install.sh
	touch $@
