#!/usr/bin/env bash
# kueue.sh: installs Kueue in the cluster of KUBECONFIG, or without it ours, whose nodes have its image. It manages the
# Jobs of namespaces that are labelled rlhf.dev/kueue=yes, and no others: its webhooks would hold up all the rest.
set -euo pipefail
. "$(dirname "$0")/env.sh"
export KUBECONFIG=${KUBECONFIG:-$kubeconfig}
"$here/tools.sh" helm
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
