#!/bin/sh
# Writes manifests/install/operator.yaml, the plain install, from the chart; or with a file, writes there instead.
set -eu
cd "$(dirname "$0")/.."
out=${1:-manifests/install/operator.yaml}
PATH=$PWD/.cache/cluster/bin:$PATH
command -v helm >/dev/null || {
    echo "hack/render-manifests.sh: there is no helm; build it: hack/cluster/tools.sh helm" >&2
    exit 1
}
mkdir -p "$(dirname "$out")"
{
    echo "# Made by hack/render-manifests.sh from charts/rlhf-operator; do not edit."
    helm template rlhf-operator charts/rlhf-operator --namespace rlhf-system --skip-tests \
        --set crds.install=false --set objectStore.existingSecret=rlhf-object-store |
        sed '/managed-by: Helm$/d; /helm.sh\//d; /^  annotations:$/{N;/\n[^ ]/!b;}; /^# Source:/d'
} >"$out.new"
mv "$out.new" "$out"
