#!/usr/bin/env bash
# advertise-gpus.sh [COUNT]: the nodes labelled with a GPU memory say that they have COUNT GPUs (2). They have none: the
# scheduler counts what a node says, and no device plugin runs here that would check it. Takes KUBECONFIG.
set -euo pipefail
count=${1:-2}
for node in $(kubectl get nodes -l rlhf.dev/gpu-memory -o name); do
    kubectl patch "$node" --subresource=status --type=merge \
        -p "{\"status\": {\"capacity\": {\"nvidia.com/gpu\": \"$count\"}, \"allocatable\": {\"nvidia.com/gpu\": \"$count\"}}}"
done
