#!/usr/bin/env bash
# Builds etcd and kube-apiserver from the Go module registry into the folder given, once for each
# version in go.mod. Ten to fifteen minutes on two cores from empty caches.
set -euo pipefail
cache=$1
cd "$(dirname "$0")"
command -v go >/dev/null || { echo "Go is needed to build kube-apiserver" >&2; exit 1; }
version=$(sed -n 's,^\tk8s.io/kubernetes \(v[0-9.]*\).*,\1,p' go.mod)
stamp=$(cat build.sh go.mod go.sum ./*/main.go | sha256sum | cut -c1-16)
folder=$cache/$version-$stamp
if [ ! -e "$folder/complete" ]; then
	echo "building etcd and kube-apiserver $version into $folder ..." >&2
	export CGO_ENABLED=0 GOFLAGS="-trimpath -buildvcs=false -mod=readonly" GOMEMLIMIT=4GiB
	mkdir -p "$folder"
	package=k8s.io/component-base/version
	minor=$(echo "$version" | cut -d. -f2)
	flags="-s -w -X $package.gitVersion=$version"
	flags="$flags -X $package.gitMajor=1 -X $package.gitMinor=$minor"
	go build -p 2 -ldflags "-s -w" -o "$folder/etcd" ./etcd
	go build -p 2 -ldflags "$flags" -o "$folder/kube-apiserver" ./kube-apiserver
	touch "$folder/complete"
fi
echo "$folder"
