#!/bin/sh
# Writes manifests/install/operator.yaml, the plain install, from the chart; or with a file, writes there instead.
set -eu
cd "$(dirname "$0")/.."
out=${1:-manifests/install/operator.yaml}
PATH=$PWD/.cache/cluster/bin:$PATH
if ! command -v helm >/dev/null; then
    echo "hack/render-manifests.sh: there is no helm; build it: hack/cluster/tools.sh helm" >&2
    exit 1
fi
mkdir -p "$(dirname "$out")"
trap 'rm -f "$out.chart" "$out.new"' EXIT
helm template rlhf-operator charts/rlhf-operator --namespace rlhf-system --skip-tests --kube-version 1.37.2 \
    --set crds.install=false --set objectStore.existingSecret=rlhf-object-store \
    --set minio.existingSecret=rlhf-minio-root >"$out.chart"
{
    echo "# Made by hack/render-manifests.sh from charts/rlhf-operator; do not edit."
    # Without Helm's own labels and hooks, and the annotations that held nothing else.
    sed -e '/managed-by: Helm$/d' -e '/helm\.sh\//d' -e '/^# Source:/d' "$out.chart" |
        sed -z 's/\n  annotations:\(\n  [^ ]\|\n[^ ]\)/\1/g'
} >"$out.new"
mv "$out.new" "$out"
