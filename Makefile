# Every target works from a fresh clone: the virtual environment is made from the lock files when it is missing or old.
BIN := .venv/bin
INSTALLED := .venv/installed
RUN := manifests/examples/positive-reviews.yaml

# What builds images.
BUILDER ?= $(firstword $(foreach name,buildah podman docker,$(if $(shell command -v $(name)),$(name))))
IMAGES := images/operator images/pipeline images/minio
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# Of every file in an image, whatever the commit, so that a layer that did not change is not pulled again.
FILES_DATE := 315619200

.PHONY: demo test test-cluster cluster-up cluster-down check generate format lock clean images $(IMAGES)

demo: $(INSTALLED)  ## The whole chain on this machine: a real model, real reviews
	$(BIN)/rlhf run $(RUN)

test: $(INSTALLED)  ## All tests that need no cluster
	$(BIN)/python -m pytest

# Files of tests/cluster that run at a time, each with a release of its own: pods wait for one another, two cores do not.
LANES ?= 3
test-cluster: $(INSTALLED)  ## Tests on a real Kubernetes: CLUSTER=a kubeconfig, else that of cluster-up; TESTS="run nodes"
	$(if $(CLUSTER),,hack/cluster/tools.sh && hack/cluster/up.sh)
	$(BIN)/python -m pytest $(if $(TESTS),$(TESTS:%=tests/cluster/test_%.py),tests/cluster) --durations 25 -n $(LANES) --dist loadscope --no-loadscope-reorder \
	  $(if $(CLUSTER),--kubeconfig $(CLUSTER))

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

COMPILE := .cache/uv/bin/uv pip compile --quiet --python-version 3.12 --no-emit-index-url --no-annotate \
  --generate-hashes --custom-compile-command "make lock"
# Only CUDA code paths ask for these.
CPU_LEAVES_OUT := triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cuda-cccl nvidia-cusolver nvidia-nvjitlink \
  nvidia-nvtx

lock:  ## Resolve the newest releases that pyproject.toml allows; the images' locks are parts of the one
	$(COMPILE) --upgrade pyproject.toml --extra operator --extra pipeline --extra dev -o requirements.lock
	$(COMPILE) pyproject.toml --extra operator -c requirements.lock -o requirements-operator.lock
	$(COMPILE) pyproject.toml --extra pipeline -c requirements.lock -o requirements-pipeline-cuda.lock
	$(COMPILE) pyproject.toml --extra pipeline -c requirements.lock -o requirements-pipeline-cpu.lock \
	  $(CPU_LEAVES_OUT:%=--no-emit-package=%)
	printf 'hatchling==1.32.0\nuv==0.13.9\n' | $(COMPILE) - -o requirements-build.lock

images: $(IMAGES)  ## The three images: BUILDER=docker, podman or buildah; VARIANT=cpu; ARGUMENTS go to the builder

images/pipeline: image_arguments = $(if $(VARIANT),--build-arg VARIANT=$(VARIANT))
images/minio: image_arguments = --build-arg MINIO=$(shell sed -n 's/^version=//p' hack/minio.sh)
$(IMAGES):
	$(BUILDER) build -f $@/Containerfile -t rlhf-$(@F):$(VERSION)$(if $(filter images/pipeline,$@),$(VARIANT:%=-%)) \
	  $(if $(filter docker,$(BUILDER)),,--timestamp $(FILES_DATE) --layers) \
	  --build-arg SOURCE_DATE_EPOCH=$(FILES_DATE) --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$(shell git rev-parse HEAD) \
	  --build-arg CREATED=$(shell TZ=UTC git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ) $(image_arguments) $(ARGUMENTS) .

clean: cluster-down
	rm -rf .venv .cache .rlhf

$(INSTALLED): requirements.lock requirements-demo.lock pyproject.toml hack/install.sh
	hack/install.sh
	touch $@
