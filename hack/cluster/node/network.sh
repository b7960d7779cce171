#!/bin/sh
# A node's pod network: writes its CNI configuration, and keeps routes to the other nodes' pod ranges.
# Environment: NODE, this node's name; POD_SUBNET, the range of all pods.
config=/etc/cni/net.d/10-pods.conflist

configure() { # configure RANGE: once
    [ -e $config ] && return
    nft -f - <<N
table ip pods
delete table ip pods
table ip pods {
    chain leave {
        type nat hook postrouting priority 101
        ip saddr $POD_SUBNET ip daddr != $POD_SUBNET fib daddr type != local masquerade
    }
}
N
    cat >$config.new <<C
{"cniVersion": "0.3.1", "name": "pods", "plugins": [
  {"type": "ptp", "ipMasq": false, "mtu": 1500, "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam-state",
    "routes": [{"dst": "0.0.0.0/0"}], "ranges": [[{"subnet": "$1"}]]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
C
    mv $config.new $config
}

pause=1 # seconds between looks: fewer while no node comes or goes
while :; do
    nodes='{range .items[*]}{.metadata.name} {.status.addresses[?(@.type=="InternalIP")].address} {.spec.podCIDR}{"\n"}{end}'
    kubectl get nodes -o "jsonpath=$nodes" >/tmp/nodes || { sleep 2; continue; }
    if cmp -s /tmp/nodes /tmp/known; then [ $pause -ge 30 ] || pause=$((pause * 2)); else pause=1; fi
    while read -r name address range; do
        [ -n "$range" ] || continue
        if [ "$name" = "$NODE" ]; then configure "$range"; else ip route replace "$range" via "$address"; fi
    done </tmp/nodes
    mv /tmp/nodes /tmp/known
    sleep $pause
done
