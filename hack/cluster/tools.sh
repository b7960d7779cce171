#!/usr/bin/env bash
# tools.sh [NAME|GROUP ...]: programs of the test cluster, built from their Go modules into .cache/cluster/bin.
# Groups: control-plane, node, clients, kwok, kueue; without arguments all. What is there in its version is not built again.
set -euo pipefail
. "$(dirname "$0")/env.sh"

kubernetes="kube-apiserver kube-controller-manager kube-scheduler kubelet kubeadm kube-proxy kubectl"
control_plane="etcd kube-apiserver kubectl kube-controller-manager kube-scheduler"
node="kubelet kubeadm kube-proxy containerd containerd-shim-runc-v2 ctr coredns host-local loopback ptp portmap local-path-provisioner kube-router"
clients="kind helm kube-score"

version_of() {
    case $1 in
    kube-score ) echo "$KUBE_SCORE" ;;
    kube-router ) echo "$KUBE_ROUTER" ;;
    kueue ) echo "$KUEUE" ;;
    kube* ) echo "$KUBERNETES" ;;
    etcd ) echo "$ETCD" ;;
    containerd* | ctr ) echo "$CONTAINERD" ;;
    coredns ) echo "$COREDNS" ;;
    host-local | loopback | ptp | portmap ) echo "$CNI_PLUGINS" ;;
    local-path-provisioner ) echo "$LOCAL_PATH_PROVISIONER" ;;
    kind ) echo "$KIND" ;;
    helm ) echo "$HELM" ;;
    kwok ) echo "$KWOK" ;;
    * ) fail "$1 is no program or group; use one of: control-plane node clients kwok kueue $control_plane $node $clients" ;;
    esac
}

# Kubernetes cannot be installed by its path: its go.mod names its own parts as v0.0.0, so ours replaces each.
kubernetes_module() {
    local module=$cache/src/kubernetes-$KUBERNETES go_mod command
    if [ ! -e "$module/ready" ]; then
        rm -rf "$module" && mkdir -p "$module"
        go_mod=$(go mod download -json "k8s.io/kubernetes@$KUBERNETES" | jq -r .GoMod)
        {
            printf 'module tools\n\ngo 1.26.0\n\nrequire k8s.io/kubernetes %s\n' "$KUBERNETES"
            awk -v part="v0${KUBERNETES#v1}" '$1 ~ /^k8s\.io\// && $2 == "v0.0.0" {print "replace", $1, "=>", $1, part}' "$go_mod"
        } >"$module/go.mod"
        (cd "$module" && go get $(for command in $kubernetes; do echo "k8s.io/kubernetes/cmd/$command@$KUBERNETES"; done)) >&2
        touch "$module/ready"
    fi
    cd "$module"
}

build_kubernetes() {
    local about=k8s.io/component-base/version minor=${KUBERNETES#v1.}
    kubernetes_module
    go build -trimpath -o "$bin.new/" \
        -ldflags "-s -w -X $about.gitVersion=$KUBERNETES -X $about.gitMajor=1 -X $about.gitMinor=${minor%%.*}" \
        "k8s.io/kubernetes/cmd/$1"
}

# So has etcd's server, and its replaced parts are the published ones.
build_etcd() {
    local module=$cache/src/etcd-$ETCD
    mkdir -p "$module" && cd "$module"
    [ -e go.mod ] || printf 'module tools\n\ngo 1.26.0\n' >go.mod
    go get "go.etcd.io/etcd/server/v3@$ETCD"
    go build -trimpath -ldflags "-s -w" -o "$bin.new/etcd" go.etcd.io/etcd/server/v3
}

# In a copy of Kubernetes' module, so that what they share is compiled once.
build_coredns() {
    local module=$cache/src/coredns-$COREDNS
    (kubernetes_module)
    rm -rf "$module" && cp -r "$cache/src/kubernetes-$KUBERNETES" "$module" && cd "$module"
    cp "$here/node/coredns.go" main.go
    go get $(sed -n 's|^\t.*"\(github.com/coredns/coredns/.*\)"$|\1|p' main.go | sed "s|$|@$COREDNS|")
    go build -trimpath -ldflags "-s -w" -o "$bin.new/coredns" .
}

# In a copy of a module, whose own go.sum holds what it is built from.
build_in_module() { # build_in_module NAME MODULE VERSION SUM PACKAGE
    local folder=$cache/src/$1-$3
    rm -rf "$folder" && cp -r --no-preserve=mode "$(folder_of_module "$2" "$3" "$4")" "$folder" && cd "$folder"
    go build -trimpath -ldflags "-s -w" -o "$bin.new/$1" "$5"
}

install() { GOBIN=$bin.new go install -trimpath -ldflags "-s -w ${2:-}" "$1"; }

build() {
    case $1 in
    kube-score ) install "github.com/zegl/kube-score/cmd/kube-score@$KUBE_SCORE" ;;
    kube-router ) build_in_module "$1" github.com/cloudnativelabs/kube-router/v2 "$KUBE_ROUTER" "$KUBE_ROUTER_SUM" ./cmd/kube-router ;;
    kueue ) build_in_module "$1" sigs.k8s.io/kueue "$KUEUE" "$KUEUE_SUM" ./cmd/kueue ;;
    kube* ) build_kubernetes "$1" ;;
    etcd ) build_etcd ;;
    containerd* | ctr ) install "github.com/containerd/containerd/v2/cmd/$1@$CONTAINERD" ;;
    coredns ) build_coredns ;;
    host-local ) install "github.com/containernetworking/plugins/plugins/ipam/$1@$CNI_PLUGINS" ;;
    loopback | ptp ) install "github.com/containernetworking/plugins/plugins/main/$1@$CNI_PLUGINS" ;;
    portmap ) install "github.com/containernetworking/plugins/plugins/meta/$1@$CNI_PLUGINS" ;;
    local-path-provisioner ) install "github.com/rancher/$1@$LOCAL_PATH_PROVISIONER" ;;
    kind ) install "sigs.k8s.io/kind@$KIND" ;;
    helm ) install "helm.sh/helm/v3/cmd/helm@$HELM" "-X helm.sh/helm/v3/internal/version.version=$HELM" ;;
    kwok ) install "sigs.k8s.io/kwok/cmd/kwok@$KWOK" && kwok_stages ;;
    esac
}

# What kwok's nodes and pods do is configuration, which lies in its module and not in its program.
kwok_stages() {
    local module file
    module=$(go mod download -json "sigs.k8s.io/kwok@$KWOK" | jq -r .Dir)
    for file in node/fast/node-initialize node/heartbeat/node-heartbeat pod/fast/pod-ready pod/fast/pod-delete; do
        echo "---"
        cat "$module/kustomize/stage/$file.yaml"
    done >"$bin.new/kwok-stages.yaml"
}

wanted=()
[ $# -gt 0 ] || set -- control-plane node clients kwok kueue
for name in "$@"; do
    case $name in
    control-plane ) wanted+=($control_plane) ;;
    node ) wanted+=($node) ;;
    clients ) wanted+=($clients) ;;
    * ) wanted+=("$name") ;;
    esac
done

export GOFLAGS=-buildvcs=false CGO_ENABLED=0
hold tools
mkdir -p "$bin" "$bin.new" "$cache/built"
for name in "${wanted[@]}"; do
    version=$(version_of "$name")
    if [ -x "$bin/$name" ] && [ "$(cat "$cache/built/$name" 2>/dev/null)" = "$version" ]; then continue; fi
    need go jq
    say "building $name $version"
    (build "$name")
    mv "$bin.new"/* "$bin/"
    echo "$version" >"$cache/built/$name"
done
say "tools are built: ${wanted[*]}"
