#!/bin/sh
# Prints the path of a MinIO server: the one in PATH, or one built from its Go module into .cache/bin (about 200 s).
set -eu
version=v0.0.0-20260212201848-7aac2a2c5b7c
bin=$(cd "$(dirname "$0")/.." && pwd)/.cache/bin
if command -v minio; then exit; fi
if [ ! -x "$bin/minio" ]; then
    mkdir -p "$bin"
    trap 'rm -rf "$bin.$$"' EXIT
    GOBIN="$bin.$$" CGO_ENABLED=0 go install -trimpath "github.com/minio/minio@$version" >&2
    mv "$bin.$$/minio" "$bin/minio"
fi
echo "$bin/minio"
