#!/usr/bin/env bash
# load-image.sh FILE...: images in docker-archive files (buildah push, docker save, podman save) onto every node of a
# kind cluster: that of KUBECONFIG, or without it ours.
set -euo pipefail
. "$(dirname "$0")/env.sh"
export KUBECONFIG=${KUBECONFIG:-$kubeconfig}
need_kind_cluster
for file in "$@"; do
    kind load image-archive "$file" --name "$name_of_cluster"
done
