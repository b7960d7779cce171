#!/usr/bin/env bash
# up.sh: starts the test cluster, built first where it is not, and prints its kubeconfig. A running one is kept.
set -euo pipefail
. "$(dirname "$0")/env.sh"
export KUBECONFIG=$kubeconfig
hold cluster
if kind get clusters 2>/dev/null | grep -qx "$cluster"; then
    if kubectl get --raw /readyz >/dev/null 2>&1; then
        say "the cluster runs already"
        echo "$KUBECONFIG"
        exit
    fi
    say "what is left of a cluster that does not answer is removed"
    "$here/down.sh"
fi
"$here/tools.sh" node clients
"$here/node-image.sh"
mkdir -p /lib/modules # kind mounts it into the nodes, also where no kernel module lies in it
# podman's own processes outlive this script: they must not keep its lock.
kind create cluster --name "$cluster" --image "$node_image:$KUBERNETES" --config "$here/kind.yaml" --wait 180s 8>&- >&2
"$here/advertise-gpus.sh" >&2
kubectl wait --for=condition=Ready node --all --timeout=120s >&2
say "the cluster runs: export KUBECONFIG=$KUBECONFIG"
echo "$KUBECONFIG"
