#!/usr/bin/env bash
# images.sh: the operator's, the pipeline's (CPU) and MinIO's image, built from images/ and put on the nodes of the kind
# cluster of KUBECONFIG (ours without it) where they are missing. Prints NAME=REPOSITORY:TAG for each; the tag is made of
# the image's digest, so that what runs is what was built.
set -euo pipefail
. "$(dirname "$0")/env.sh"
export KUBECONFIG=${KUBECONFIG:-$kubeconfig}
archives=$cache/images

# Without an image registry: a Debian with what each Containerfile asks of its BASE.
debian=trixie
make_base() { # make_base NAME PACKAGES [FOLDER-TO-ADD]
    local name=$1 packages=$2 added=${3:-} made rootfs=$cache/bases/$1 container
    made="$debian $packages $added"
    if [ "$(cat "$cache/built/$name" 2>/dev/null)" = "$made" ] && buildah inspect --type image "localhost/$name" >/dev/null 2>&1; then return; fi
    say "base image $name"
    rm -rf "$rootfs" && mkdir -p "$rootfs"
    debootstrap --variant=minbase --include="$packages" "$debian" "$rootfs" >"$cache/bases/$name.log" 2>&1 ||
        fail "debootstrap: $(tail -3 "$cache/bases/$name.log")"
    rm -rf "$rootfs"/var/cache/apt/archives/*.deb "$rootfs"/var/lib/apt/lists/* "$rootfs"/usr/share/{doc,man}/*
    # What this machine trusts, its package mirror's certificate among it, the builds inside must trust too.
    cp -L /etc/ssl/certs/ca-certificates.crt "$rootfs/etc/ssl/certs/"
    [ -z "$added" ] || cp -a "$added" "$rootfs/usr/local/go"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$rootfs" / >/dev/null
    [ -z "$added" ] || buildah config --env PATH=/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah commit --quiet --rm "$container" "localhost/$name" >/dev/null
    rm -rf "$rootfs"
    echo "$made" >"$cache/built/$name"
}

build() { # build NAME BASE ARGUMENT...: as everybody builds it, by the Makefile
    local name=$1 base=$2
    shift 2
    say "image of the $name"
    make --no-print-directory -C "$root" "images/$name" VARIANT=cpu BUILDER="$builder" \
        ARGUMENTS="${base:+--build-arg BASE=localhost/$base --isolation chroot --network host} $*" \
        >"$archives/$name.log" 2>&1 || fail "$name: $(tail -20 "$archives/$name.log")"
}

put_on_nodes() { # put_on_nodes NAME BUILT-TAG [SELECTOR]: on every node that takes pods, or those with these labels
    local name=$1 built=$2 selector=${3:-!node-role.kubernetes.io/control-plane} id reference file missing=() node
    case $builder in
    docker ) id=$(docker image inspect --format '{{.Id}}' "$built") ;;
    * ) id=$(buildah inspect --type image --format '{{.FromImageID}}' "$built") ;;
    esac
    id=${id#sha256:}
    reference=localhost/rlhf-$name:${id:0:12}
    for node in $(kubectl get nodes --selector "$selector" -o 'jsonpath={.items[*].metadata.name}'); do
        "$engine" exec "$node" ctr --namespace k8s.io images ls --quiet | grep -x "$reference" >/dev/null || missing+=("$node")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        say "$reference to ${missing[*]}"
        file=$archives/$name.tar
        rm -f "$file"
        case $builder in
        docker ) docker tag "$built" "$reference" && docker save --output "$file" "$reference" ;;
        * ) buildah push --quiet "$built" "docker-archive:$file:$reference" ;;
        esac
        kind load image-archive "$file" --name "$name_of_cluster" --nodes "$(IFS=, && echo "${missing[*]}")" >&2
        rm -f "$file"
    fi
    echo "$name=$reference"
}

need_kind_cluster
case $provider in
podman ) builder=buildah engine=podman ;;
* ) builder=docker engine=docker ;;
esac
hold images
mkdir -p "$archives" "$cache/built" "$cache/bases"
python_base= go_base= go_caches=
if [ $builder = buildah ]; then
    need buildah debootstrap go jq make
    python_base=base-python go_base=base-go
    make_base $python_base python3,python3-venv,ca-certificates
    make_base $go_base ca-certificates "$(go env GOROOT)"
    mkdir -p "$(go env GOMODCACHE)" "$(go env GOCACHE)"
    go_caches="--volume $(go env GOMODCACHE):/root/go/pkg/mod --volume $(go env GOCACHE):/root/.cache/go-build"
fi
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")
build operator "$python_base"
build pipeline "$python_base"
build minio "$go_base" $go_caches
put_on_nodes operator "rlhf-operator:$version"
put_on_nodes pipeline "rlhf-pipeline:$version-cpu" rlhf.dev/gpu-memory # 4 GB: where the runs' selector leads
put_on_nodes minio "rlhf-minio:$version"
say "the images are on the nodes"
