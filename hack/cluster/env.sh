# Sourced by the scripts beside it: versions, folders, and a podman with a storage of its own.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cache=$root/.cache/cluster
bin=$cache/bin
cluster=rlhf-test
node_image=localhost/kindest/node
set -a
. "$here/versions.env"
set +a
export PATH=$bin:$PATH
kubeconfig=$cache/kubeconfig
export KIND_EXPERIMENTAL_PROVIDER=podman
export CONTAINERS_CONF=$cache/podman/containers.conf CONTAINERS_STORAGE_CONF=$cache/podman/storage.conf
export XDG_RUNTIME_DIR=$cache/podman/run

say() { echo "[${SECONDS}s] $*" >&2; }
fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}
need() { # need PROGRAM...: each is installed, or the message says what to install
    local program missing= PATH=$PATH:/usr/sbin:/usr/lib/podman:/usr/libexec/podman
    for program in "$@"; do
        command -v "$program" >/dev/null || missing="$missing $program"
    done
    [ -z "$missing" ] || fail "not installed:$missing; with Debian or Ubuntu: apt-get install --no-install-recommends podman netavark aardvark-dns iptables buildah runc jq debootstrap gcc openssl"
}
hold() { # hold NAME: one script at a time does this; the lock goes with the process
    mkdir -p "$cache"
    exec 8>"$cache/$1.lock"
    flock -n 8 || { say "waiting for another $1" && flock 8; }
}
need_kind_cluster() { # sets provider and name_of_cluster from the cluster of KUBECONFIG
    # A node of kind says kind://PROVIDER/CLUSTER/NODE.
    IFS=/ read -r _ _ provider name_of_cluster _ < <(kubectl get nodes -o 'jsonpath={.items[0].spec.providerID}{"\n"}')
    [ -n "${name_of_cluster:-}" ] || fail "the nodes of $KUBECONFIG are not kind's; push the images to a registry that they can pull from"
    [ "$provider" = podman ] || unset KIND_EXPERIMENTAL_PROVIDER CONTAINERS_CONF CONTAINERS_STORAGE_CONF XDG_RUNTIME_DIR
}
folder_of_module() { # folder_of_module MODULE VERSION SUM: where its files lie, once they are those of the checksum
    local found
    found=$(GONOSUMDB=$1 go mod download -json "$1@$2")
    [ "$(jq -r .Sum <<<"$found")" = "$3" ] || fail "$1 $2 has the checksum $(jq -r .Sum <<<"$found"), not $3"
    jq -r .Dir <<<"$found"
}
