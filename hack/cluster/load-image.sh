#!/usr/bin/env bash
# load-image.sh FILE...: images in docker-archive files (buildah push, docker save, podman save) onto every node of a
# kind cluster: that of KUBECONFIG, or without it ours.
set -euo pipefail
. "$(dirname "$0")/env.sh"
export KUBECONFIG=${KUBECONFIG:-$kubeconfig}
# A node of kind says kind://PROVIDER/CLUSTER/NODE.
IFS=/ read -r _ _ provider name _ < <(kubectl get nodes -o 'jsonpath={.items[0].spec.providerID}{"\n"}')
[ -n "${name:-}" ] || fail "the nodes of $KUBECONFIG are not kind's; push the images to a registry that they can pull from"
[ "$provider" = podman ] || unset KIND_EXPERIMENTAL_PROVIDER CONTAINERS_CONF CONTAINERS_STORAGE_CONF XDG_RUNTIME_DIR
for file in "$@"; do
    kind load image-archive "$file" --name "$name"
done
