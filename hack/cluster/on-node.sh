#!/usr/bin/env bash
# on-node.sh NODE COMMAND...: runs a command, as root, on a node of the kind cluster of KUBECONFIG (ours without it).
set -euo pipefail
. "$(dirname "$0")/env.sh"
export KUBECONFIG=${KUBECONFIG:-$kubeconfig}
[ $# -ge 2 ] || fail "usage: on-node.sh NODE COMMAND..."
# A node's container has the node's name; the API server, which may be what the command is about, is not asked.
if [ "$KUBECONFIG" = "$kubeconfig" ]; then exec podman exec "$@"; fi
exec docker exec "$@"
