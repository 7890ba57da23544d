#!/usr/bin/env bash
# Builds Envoy Gateway from the Go module registry, once for each version in go.mod, and prints the
# folder that has it. From empty caches this takes some five minutes on two cores.
# usage: build.sh             builds what is missing
#        build.sh --look      builds nothing; fails if something is missing
#        build.sh --versions  prints the program with its versions
set -euo pipefail
cd "$(dirname "$0")"
module=github.com/envoyproxy/gateway
version=$(sed -n "s,^.*$module \(v[0-9.]*\).*,\1,p" go.mod)
stamp=$(cat build.sh go.mod go.sum | sha256sum | cut -c1-16)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/llm-extproc/envoy-gateway/$version-$stamp
if [ ! -e "$folder/complete" ]; then
  if [ "${1:-}" = --look ]; then
    echo "Envoy Gateway $version is not built" >&2
    exit 1
  fi
  command -v go >/dev/null || {
    echo "Go is needed to build Envoy Gateway; install it, and run this again" >&2
    exit 1
  }
  echo "building Envoy Gateway $version into $folder ..." >&2
  export CGO_ENABLED=0 GOFLAGS="-trimpath -buildvcs=false -mod=readonly" GOMEMLIMIT=3GiB
  mkdir -p "$folder"
  flags="-s -w -X $module/internal/cmd/version.envoyGatewayVersion=$version"
  go build -p 2 -ldflags "$flags" -o "$folder/envoy-gateway" "$module/cmd/envoy-gateway"
  touch "$folder/complete"
fi
if [ "${1:-}" = --versions ]; then
  "$folder/envoy-gateway" version | sed -n 's/^ENVOY_GATEWAY_VERSION: /Envoy Gateway /p'
else
  echo "$folder"
fi
