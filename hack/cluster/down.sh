#!/usr/bin/env bash
# down.sh: removes the test cluster and everything it left, also after a crash. Built tools and images are kept.
set -euo pipefail
. "$(dirname "$0")/env.sh"
export KUBECONFIG=$kubeconfig
[ -e "$CONTAINERS_CONF" ] || exit 0
if [ -x "$bin/kind" ]; then kind delete cluster --name "$cluster" >&2 || true; fi
# This podman's storage is the cluster's alone: whatever is in it is the cluster's.
podman rm --all --force --volumes --time 0 >/dev/null
podman volume prune --force >/dev/null
podman network prune --force >/dev/null
rm -f "$KUBECONFIG"
left=$(podman ps --all --quiet | wc -l)
[ "$left" = 0 ] || fail "$left containers could not be removed; see: podman ps --all with CONTAINERS_CONF=$CONTAINERS_CONF"
say "the cluster is gone"
