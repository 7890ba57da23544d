#!/usr/bin/env bash
# Builds etcd, kube-apiserver and the EndpointSlice controller from the Go module registry, once for
# each version in go.mod, and prints the folder that has them. From empty caches this takes ten to
# fifteen minutes on two cores.
# usage: build.sh             builds what is missing
#        build.sh --look      builds nothing; fails if something is missing
#        build.sh --versions  prints the programs with their versions
set -euo pipefail
cd "$(dirname "$0")"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/llm-extproc/kubernetes
version=$(sed -n 's,^\tk8s.io/kubernetes \(v[0-9.]*\).*,\1,p' go.mod)
stamp=$(cat build.sh go.mod go.sum ./*/main.go | sha256sum | cut -c1-16)
folder=$cache/$version-$stamp
if [ ! -e "$folder/complete" ]; then
  if [ "${1:-}" = --look ]; then
    echo "kube-apiserver $version is not built" >&2
    exit 1
  fi
  command -v go >/dev/null || {
    echo "Go is needed to build kube-apiserver; install it, and run this again" >&2
    exit 1
  }
  echo "building etcd, kube-apiserver and the EndpointSlice controller $version into $folder ..." >&2
  export CGO_ENABLED=0 GOFLAGS="-trimpath -buildvcs=false -mod=readonly" GOMEMLIMIT=3GiB
  mkdir -p "$folder"
  package=k8s.io/component-base/version
  minor=$(echo "$version" | cut -d. -f2)
  flags="-s -w -X $package.gitVersion=$version"
  flags="$flags -X $package.gitMajor=1 -X $package.gitMinor=$minor"
  go build -p 2 -ldflags "-s -w" -o "$folder/etcd" ./etcd
  go build -p 2 -ldflags "$flags" -o "$folder/kube-apiserver" ./kube-apiserver
  go build -p 2 -ldflags "$flags" -o "$folder/endpointslice-controller" ./endpointslice-controller
  touch "$folder/complete"
fi
if [ "${1:-}" = --versions ]; then
  "$folder/etcd" --version | sed -n 1p
  "$folder/kube-apiserver" --version
  echo "EndpointSlice controller $version"
else
  echo "$folder"
fi
