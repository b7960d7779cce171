#!/usr/bin/env bash
# node-image.sh: kind's node image, made of Debian packages, kind's own files and the built tools; no image registry.
# Kept in the cluster's own podman storage until a version or a file of this folder changes.
set -euo pipefail
. "$(dirname "$0")/env.sh"

work=$cache/node
rootfs=$work/rootfs
folders=$work/images
digest=$(cat "$here"/versions.env "$here"/node-image.sh "$here"/node/* | sha256sum | cut -d' ' -f1)

packages=systemd,conntrack,iptables,ipset,nftables,iproute2,ethtool,kmod,libseccomp2,runc,e2fsprogs,ca-certificates,jq,procps,pigz,busybox-static

write_podman_configuration() {
    mkdir -p "$cache/podman/run"
    cat >"$CONTAINERS_STORAGE_CONF" <<C
[storage]
driver = "overlay"
graphroot = "$cache/podman/storage"
runroot = "$cache/podman/run/storage"
C
    # Limits that a process without CAP_SYS_RESOURCE may set; runc, because crun refuses hybrid cgroups; no limit of
    # processes, or the kubelet and all its pods share podman's default.
    cat >"$CONTAINERS_CONF" <<C
[containers]
pids_limit = 0
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
log_driver = "k8s-file"
[network]
network_backend = "netavark"
network_config_dir = "$cache/podman/networks"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "$cache/podman/run/libpod"
C
}

make_rootfs() {
    local made="$DEBIAN $packages"
    if [ "$(cat "$work/rootfs.made" 2>/dev/null)" != "$made" ]; then
        say "Debian's packages"
        rm -rf "$rootfs" "$work/rootfs.made"
        debootstrap --variant=minbase --include="$packages" "$DEBIAN" "$rootfs" >"$work/debootstrap.log" 2>&1 ||
            fail "debootstrap: $(tail -3 "$work/debootstrap.log")"
        rm -rf "$rootfs"/var/cache/apt/archives/*.deb "$rootfs"/var/lib/apt/lists/* "$rootfs"/usr/share/{doc,man}/*
        echo "$made" >"$work/rootfs.made"
    fi
}

archive() { # archive NAME REFERENCE [ENTRYPOINT...]: the folder NAME as an image that every node has from the start
    local name=$1 reference=$2
    shift 2
    python3 "$here/node/image_archive.py" "$work/archives/$name.tar" "$reference" "$folders/$name" "$@"
}

make_archives() {
    say "images of the control plane"
    rm -rf "$folders" "$work/archives" && mkdir -p "$folders" "$work/archives"
    local list component
    list=$(kubeadm config images list --kubernetes-version "$KUBERNETES" 2>/dev/null)
    named() { grep "/$1:" <<<"$list" || fail "kubeadm names no image of $1"; }
    for component in kube-apiserver kube-controller-manager kube-scheduler etcd; do
        mkdir -p "$folders/$component"/{usr/local/bin,etc,tmp}
        cp "$bin/$component" "$folders/$component/usr/local/bin/"
        archive "$component" "$(named "$component")"
    done
    mkdir -p "$folders/coredns" "$folders/pause"
    cp "$bin/coredns" "$folders/coredns/"
    archive coredns "$(named coredns)" /coredns
    gcc -static -Os -o "$folders/pause/pause" "$here/node/pause.c"
    archive pause "registry.k8s.io/pause:$PAUSE" /pause
    make_firewall_folder "$folders/kube-proxy"
    cp -a "$folders/kube-proxy" "$folders/pod-network"
    cp -a "$folders/kube-proxy" "$folders/network-policies"
    cp "$bin/kube-proxy" "$folders/kube-proxy/usr/local/bin/"
    archive kube-proxy "$(named kube-proxy)"
    cp "$bin/kubectl" "$here/node/network.sh" "$folders/pod-network/usr/local/bin/"
    chmod +x "$folders/pod-network/usr/local/bin/network.sh"
    cp "$rootfs/bin/busybox" "$folders/pod-network/bin/"
    for component in sh ip sleep cat mv cmp; do ln -sf busybox "$folders/pod-network/bin/$component"; done
    archive pod-network localhost/pod-network:1 /bin/sh /usr/local/bin/network.sh
    cp "$bin/kube-router" "$folders/network-policies/usr/local/bin/"
    archive network-policies localhost/network-policies:1 /usr/local/bin/kube-router
    mkdir -p "$folders/local-path"/{usr/local/bin,bin,etc,tmp}
    cp "$bin/local-path-provisioner" "$folders/local-path/usr/local/bin/"
    cp "$rootfs/bin/busybox" "$folders/local-path/bin/"
    for component in sh mkdir chmod rm; do ln -sf busybox "$folders/local-path/bin/$component"; done
    archive local-path localhost/local-path:1
}

make_firewall_folder() { # iptables, ipset, nft and conntrack of the rootfs with the libraries that they load
    local to=$1 lib=usr/lib/x86_64-linux-gnu name
    mkdir -p "$to"/{usr/local/bin,usr/sbin,$lib,usr/lib64,etc,run,tmp,bin}
    for name in lib lib64 sbin; do ln -s "usr/$name" "$to/$name"; done
    cp "$rootfs"/usr/sbin/{nft,xtables-nft-multi,conntrack,ipset} "$to/usr/sbin/"
    for name in ip{,6}tables{,-save,-restore}; do ln -s xtables-nft-multi "$to/usr/sbin/$name"; done
    cp -a "$rootfs/$lib/xtables" "$to/$lib/"
    cp "$rootfs/etc/protocols" "$to/etc/"
    chroot "$rootfs" sh -c "for file in /usr/sbin/nft /usr/sbin/xtables-nft-multi /usr/sbin/conntrack /usr/sbin/ipset /$lib/xtables/*.so
        do ldd \$file; done" | grep -o '/[^ :]*\.so[^ :]*' | grep -v /xtables/ | sort -u |
        while read -r name; do cp -L "$rootfs$name" "$to/$lib/"; done
    cp -L "$rootfs/lib64/ld-linux-x86-64.so.2" "$to/usr/lib64/"
}

# The rootfs as kind's own Dockerfile lays it out, with its files from its module.
lay_out_node() {
    say "the node's files"
    local files
    files=$(go mod download -json "sigs.k8s.io/kind@$KIND" | jq -r .Dir)/images/base/files
    cp -r --no-preserve=mode "$files/." "$rootfs/"
    chmod 0755 "$rootfs"/usr/local/bin/* "$rootfs"/kind "$rootfs"/kind/bin "$rootfs"/kind/bin/*
    find "$rootfs/lib/systemd/system/sysinit.target.wants/" -name systemd-tmpfiles-setup.service -delete
    rm -f "$rootfs"/{lib,etc}/systemd/system/{multi-user,local-fs,basic}.target.wants/* \
        "$rootfs"/lib/systemd/system/sockets.target.wants/*{udev,initctl}* "$rootfs"/etc/systemd/system/*.wants/* \
        "$rootfs/usr/sbin/policy-rc.d"
    grep -q ReadKMsg=no "$rootfs/etc/systemd/journald.conf" || echo ReadKMsg=no >>"$rootfs/etc/systemd/journald.conf"
    [ -e "$rootfs/sbin/init" ] || ln -s /usr/lib/systemd/systemd "$rootfs/sbin/init"
    {
        chroot "$rootfs" systemctl enable kubelet.service containerd.service undo-mount-hacks.service
        chroot "$rootfs" systemctl mask systemd-binfmt.service
    } >"$work/systemctl.log" 2>&1
    mkdir -p "$rootfs"/{etc/kubernetes/manifests,opt/cni/bin,etc/cni/net.d,kind/manifests,lib/modules}
    cp "$bin"/{containerd,containerd-shim-runc-v2,ctr} "$rootfs/usr/local/bin/"
    cp "$bin"/{kubelet,kubectl,kubeadm} "$rootfs/usr/bin/"
    cp "$bin"/{host-local,loopback,ptp,portmap} "$rootfs/opt/cni/bin/"
    ctr oci spec | jq '.hooks.createContainer += [{"path": "/kind/bin/mount-product-files.sh"}] | del(.process.rlimits)' \
        >"$rootfs/etc/containerd/cri-base.json"
    # Without CAP_SYS_RESOURCE a pod's score cannot be lowered, and runc ends with a message that says nothing.
    sed -i 's/restrict_oom_score_adj = false/restrict_oom_score_adj = true/' "$rootfs/etc/containerd/config.toml"
    printf %s "$KUBERNETES" >"$rootfs/kind/version"
    rm -f "$rootfs"/etc/cni/net.d/*
    cp "$here/node/network.yaml" "$rootfs/kind/manifests/default-cni.yaml"
    cp "$here/node/storage.yaml" "$rootfs/kind/manifests/default-storage.yaml"
}

# The archives in the node's containerd, put there by the same containerd.
preload_archives() {
    say "archives into containerd"
    local state=$work/containerd archive server
    rm -rf "$rootfs/var/lib/containerd" "$state" && mkdir -p "$rootfs/var/lib/containerd" "$state"
    cat >"$state/config.toml" <<C
version = 3
root = "$rootfs/var/lib/containerd"
state = "$state/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri"]
[grpc]
address = "$state/socket"
[ttrpc]
address = "$state/socket.ttrpc"
C
    setpriv --pdeathsig KILL "$bin/containerd" --config "$state/config.toml" >"$state/log" 2>&1 &
    server=$!
    for _ in $(seq 100); do
        ctr --address "$state/socket" version >/dev/null 2>&1 && break
        sleep 0.1
    done
    for archive in "$work"/archives/*.tar; do
        ctr --address "$state/socket" --namespace k8s.io images import --local --all-platforms --no-unpack --digests "$archive" >/dev/null
    done
    kill $server
    wait $server || true
}

commit_image() {
    say "the image"
    local container mount
    : >"$rootfs/etc/resolv.conf"
    container=$(buildah from scratch)
    mount=$(buildah mount "$container")
    cp -a "$rootfs/." "$mount/"
    buildah umount "$container" >/dev/null
    buildah config --env container=docker --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        --stop-signal SIGRTMIN+3 --entrypoint '["/usr/local/bin/entrypoint", "/sbin/init"]' "$container"
    buildah commit --quiet --rm "$container" "$node_image:$KUBERNETES" >/dev/null
    podman image prune --force >/dev/null
}

need podman netavark aardvark-dns iptables buildah runc jq debootstrap gcc setpriv go
hold node-image
write_podman_configuration
if [ "$(cat "$cache/built/node-image" 2>/dev/null)" = "$digest" ] && podman image exists "$node_image:$KUBERNETES"; then exit; fi
mkdir -p "$work" "$cache/built"
make_rootfs
make_archives
lay_out_node
preload_archives
commit_image
rm -rf "$folders" "$work/archives"
echo "$digest" >"$cache/built/node-image"
say "the node image is built: $node_image:$KUBERNETES"
