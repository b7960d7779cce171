#!/usr/bin/env bash
# A Kubernetes API with its controllers and scheduler but no nodes, in a folder of its own, ready in seconds.
#   control-plane.sh run DIR [--kwok]     in the foreground: all of it ends with this process, however that dies
#   control-plane.sh start DIR [--kwok]   in the background; returns when the API answers
#   control-plane.sh stop DIR             ends it and empties the folder but for the logs
# DIR/kubeconfig is an administrator's, DIR/NAME.pid each program's. An API server that ends is started again. With
# --kwok, nodes annotated kwok.x-k8s.io/node=fake are kept Ready and their pods "run" until somebody says that they end.
# DIR/audit.log has a line for every request of a service account; an administrator's are not written down.
set -euo pipefail
. "$(dirname "$0")/env.sh"

usage="usage: control-plane.sh run|start|stop DIR [--kwok]"
[ $# -ge 2 ] || fail "$usage"
action=$1
mkdir -p "$2" && dir=$(cd "$2" && pwd)
kwok=${3:-}
[ -z "$kwok" ] || [ "$kwok" = --kwok ] || fail "$usage"
export KUBECONFIG=$dir/kubeconfig

# The lock's holders are the supervisor and every process under it: it is free when all of them are gone.
locked() { ! flock -n "$dir/lock" true; }

run() {
    need openssl python3 setpriv
    for program in etcd kube-apiserver kubectl kube-controller-manager kube-scheduler ${kwok:+kwok}; do
        [ -x "$bin/$program" ] || fail "$program is not built; run hack/cluster/tools.sh control-plane${kwok:+ kwok}"
    done
    exec 9>"$dir/lock"
    flock -n 9 || fail "a control plane runs in $dir already; end it with: control-plane.sh stop $dir"
    echo $$ >"$dir/pid"
    trap end_children EXIT
    trap 'exit 0' INT TERM
    rm -rf "$dir/etcd" "$dir/certs" "$KUBECONFIG" "$dir"/kube-*.log "$dir"/{etcd,kwok,audit}.log
    write_credentials
    start_components
    echo ready >"$dir/ready"
    say "control plane is ready: export KUBECONFIG=$KUBECONFIG"
    while wait -n -p ended "${!children[@]}" || true; do
        [ "${children[$ended]}" = kube-apiserver ] || fail "${children[$ended]} ended; its log is in $dir"
        unset "children[$ended]"
        say "kube-apiserver ended; it is started again"
        api_server
    done
}

declare -A children=() # pid -> name
component() { # component NAME ARGUMENT...
    local name=$1
    shift
    setpriv --pdeathsig KILL "$bin/$name" "$@" >>"$dir/$name.log" 2>&1 &
    children[$!]=$name
    echo $! >"$dir/$name.pid"
}

end_children() {
    rm -f "$dir/ready" "$dir/pid"
    [ ${#children[@]} -eq 0 ] || kill -KILL "${!children[@]}" 2>/dev/null || true
    wait || true
    rm -rf "$dir/etcd"
}

write_credentials() {
    mkdir -p "$dir/certs"
    openssl genrsa -out "$dir/certs/service-accounts.key" 2048 2>/dev/null
    token=$(openssl rand -hex 16)
    (umask 077 && echo "$token,admin,admin,system:masters" >"$dir/certs/tokens.csv")
    cat >"$dir/certs/audit-policy.yaml" <<P
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata, userGroups: ["system:serviceaccounts"]}]
P
    read -r etcd_port peer_port api_port < <(python3 -c '
import socket
free = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(each.getsockname()[1] for each in free))')
}

start_components() {
    local fast="--kube-api-qps 500 --kube-api-burst 1000" # else they are what a load test measures
    component etcd --data-dir "$dir/etcd" --unsafe-no-fsync --log-level warn \
        --listen-client-urls "http://127.0.0.1:$etcd_port" --advertise-client-urls "http://127.0.0.1:$etcd_port" \
        --listen-peer-urls "http://127.0.0.1:$peer_port" --initial-advertise-peer-urls "http://127.0.0.1:$peer_port" \
        --initial-cluster "default=http://127.0.0.1:$peer_port"
    api_server
    until_true 60 "the API server" test -s "$dir/certs/apiserver.crt"
    write_kubeconfig
    until_true 60 "the API server" kubectl get --raw /readyz
    # Only now: it ends at once where the API server has not yet written its first roles and configuration.
    # A quota that is made before its resource is known is looked at again only then.
    component kube-controller-manager --resource-quota-sync-period 5s --kubeconfig "$KUBECONFIG" --leader-elect=false --secure-port 0 $fast \
        --concurrent-job-syncs 20 \
        --root-ca-file "$dir/certs/apiserver.crt" \
        --service-account-private-key-file "$dir/certs/service-accounts.key"
    component kube-scheduler --kubeconfig "$KUBECONFIG" --leader-elect=false --secure-port 0 $fast
    # Pods get addresses of this machine, where a connection is refused at once and not tried for long.
    [ -z "$kwok" ] || component kwok --kubeconfig "$KUBECONFIG" --config "$bin/kwok-stages.yaml" \
        --cidr 127.128.0.0/16 --manage-all-nodes=false --manage-nodes-with-annotation-selector kwok.x-k8s.io/node=fake
    until_true 60 "the controller manager" kubectl get serviceaccount default --namespace default
}

api_server() {
    component kube-apiserver --etcd-servers "http://127.0.0.1:$etcd_port" --cert-dir "$dir/certs" \
        --bind-address 127.0.0.1 --advertise-address 127.0.0.1 --secure-port "$api_port" \
        --endpoint-reconciler-type none --service-cluster-ip-range 10.96.0.0/16 --allow-privileged \
        --authorization-mode RBAC --token-auth-file "$dir/certs/tokens.csv" \
        --audit-policy-file "$dir/certs/audit-policy.yaml" --audit-log-path "$dir/audit.log" \
        --service-account-issuer https://kubernetes.default.svc \
        --service-account-key-file "$dir/certs/service-accounts.key" \
        --service-account-signing-key-file "$dir/certs/service-accounts.key"
}

until_true() { # until_true SECONDS WHAT COMMAND...
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || fail "$what did not start; its log is in $dir"
        sleep 0.1
    done
}

write_kubeconfig() {
    (umask 077 && cat >"$KUBECONFIG") <<C
apiVersion: v1
kind: Config
current-context: control-plane
contexts: [{name: control-plane, context: {cluster: control-plane, user: admin}}]
clusters:
- name: control-plane
  cluster: {server: "https://127.0.0.1:$api_port", certificate-authority: "$dir/certs/apiserver.crt"}
users: [{name: admin, user: {token: $token}}]
C
}

start() {
    locked && fail "a control plane runs in $dir already; end it with: control-plane.sh stop $dir"
    rm -f "$dir/ready"
    setsid "$0" run "$dir" $kwok </dev/null >"$dir/supervisor.log" 2>&1 &
    local deadline=$((SECONDS + 120))
    until [ -e "$dir/ready" ]; do
        kill -0 $! 2>/dev/null && [ $SECONDS -lt $deadline ] || fail "not started: $(tail -5 "$dir/supervisor.log")"
        sleep 0.1
    done
    cat "$dir/supervisor.log"
}

stop() {
    if locked; then
        kill "$(cat "$dir/pid")"
        flock -w 30 "$dir/lock" true || fail "still running after 30 s in $dir, pid $(cat "$dir/pid")"
    fi
    rm -rf "$dir/etcd" "$dir/certs" "$KUBECONFIG" "$dir"/*.pid "$dir/pid" "$dir/ready"
}

case $action in
run | start | stop ) $action ;;
* ) fail "$usage" ;;
esac
