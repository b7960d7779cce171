#!/usr/bin/env bash
# kueue.sh: installs Kueue, built here, in the kind cluster of KUBECONFIG, or without it ours. It manages the Jobs of
# namespaces that are labelled rlhf.dev/kueue=yes, and no others: its webhooks would hold up all the rest.
set -euo pipefail
. "$(dirname "$0")/env.sh"
export KUBECONFIG=${KUBECONFIG:-$kubeconfig}
"$here/tools.sh" helm kueue
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/files"
cp "$bin/kueue" "$folder/files/manager"
python3 "$here/node/image_archive.py" "$folder/kueue.tar" "localhost/kueue:$KUEUE" "$folder/files"
"$here/load-image.sh" "$folder/kueue.tar" >&2
chart=$(folder_of_module sigs.k8s.io/kueue "$KUEUE" "$KUEUE_SUM")/charts/kueue
helm upgrade --install kueue "$chart" --namespace kueue-system --create-namespace --wait --timeout 180s --values - >&2 <<V
controllerManager:
  manager:
    image: {repository: localhost/kueue, tag: $KUEUE, pullPolicy: Never}
    podSecurityContext: {runAsUser: 65532}
    resources: {requests: {cpu: 50m, memory: 128Mi}}
managerConfig:
  controllerManagerConfigYaml: |
    apiVersion: config.kueue.x-k8s.io/v1beta2
    kind: Configuration
    managedJobsNamespaceSelector: {matchLabels: {rlhf.dev/kueue: "yes"}}
    integrations: {frameworks: [batch/job]}
V
say "Kueue $KUEUE runs"
