#!/usr/bin/env bash
# up.sh: starts the test cluster, built first where it is not, and prints its kubeconfig. A running one is kept.
set -euo pipefail
. "$(dirname "$0")/env.sh"
export KUBECONFIG=$kubeconfig
hold cluster
if kind get clusters 2>/dev/null | grep -qx "$cluster"; then
    made=$(kind get nodes --name "$cluster" | wc -l)
    joined=$({ kubectl get nodes --output name || true; } | wc -l)
    if [ "$joined" = "$made" ]; then
        say "the cluster runs already"
        echo "$KUBECONFIG"
        exit
    fi
    say "$joined of $made nodes answer: what is left of the cluster is removed"
    "$here/down.sh"
fi
"$here/tools.sh" node clients
"$here/node-image.sh"
mkdir -p /lib/modules # kind mounts it into the nodes, also where no kernel module lies in it
# podman's own processes outlive this script: they must not keep its lock.
create() { kind create cluster --name "$cluster" --image "$node_image:$KUBERNETES" --config "$here/kind.yaml" --wait 180s --retain 8>&- >&2; }
last_words() { # of what starts a node, so that the end of a log tells why none came up
    local node
    for node in $(kind get nodes --name "$cluster" 2>/dev/null); do
        echo "$node: $(podman exec "$node" systemctl is-active containerd kubelet 2>&1 | paste -sd' ') (containerd, kubelet)"
        podman exec "$node" journalctl --no-pager --output cat --lines 400 --unit containerd --unit kubelet 2>&1 |
            grep -E '^[EF][0-9]{4} |level=(error|fatal)|fail' | cut -c1-300 | tail -5 | sed 's/^/  /' || true
    done >&2
}
if ! create; then
    last_words
    say "no cluster came up; once more from nothing: a machine that is busy with other things may be too slow for kubeadm"
    "$here/down.sh"
    create || { last_words && fail "no cluster came up in two attempts; its nodes are kept until the next, to be looked at"; }
fi
"$here/advertise-gpus.sh" >&2
kubectl wait --for=condition=Ready node --all --timeout=120s >&2
say "the cluster runs: export KUBECONFIG=$KUBECONFIG"
echo "$KUBECONFIG"
