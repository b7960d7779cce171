# Every target works from a fresh clone: the virtual environment is made from the lock files when it is missing or old.
BIN := .venv/bin
INSTALLED := .venv/installed
RUN := manifests/examples/positive-reviews.yaml

.PHONY: demo test test-cluster cluster-up cluster-down check generate format lock clean

demo: $(INSTALLED)  ## The whole chain on this machine: a real model, real reviews
	$(BIN)/rlhf run $(RUN)

test: $(INSTALLED)  ## All tests that need no cluster
	$(BIN)/python -m pytest

test-cluster: $(INSTALLED)  ## Tests on a real Kubernetes: CLUSTER=a kubeconfig, or without it the one of cluster-up
	$(if $(CLUSTER),,hack/cluster/tools.sh && hack/cluster/up.sh)
	$(BIN)/python -m pytest tests/cluster $(if $(CLUSTER),--kubeconfig $(CLUSTER))

cluster-up:  ## A kind cluster of three nodes, all built here: 30 minutes the first time, one after that
	hack/cluster/up.sh

cluster-down:  ## Removes it; what was built stays for the next one
	hack/cluster/down.sh

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

clean: cluster-down
	rm -rf .venv .cache .rlhf

$(INSTALLED): requirements.lock requirements-demo.lock pyproject.toml hack/install.sh
	hack/install.sh
	touch $@
