#!/usr/bin/env bash
# Downloads the kinds of gateways and operators from the Go module registry, once, and prints the
# folder that has them. Separate from build.sh, since a build takes minutes.
# usage: crds.sh             downloads what is missing
#        crds.sh --look      downloads nothing; fails if something is missing
#        crds.sh --versions  prints the modules with their versions
set -euo pipefail
# Module, its sum as in a go.sum, and the folder and names of the files that are used. The standard
# channel of the Gateway API is the smaller one: what it accepts, the experimental one accepts too.
wanted() {
  cat <<'END'
github.com/envoyproxy/gateway@v1.9.1 h1:vAVp6/AlBXJ1aOhp1mxL7fNEzVEfjADUguUhm2wzxQY= charts/gateway-helm/charts/crds/crds/generated *.yaml
github.com/kedacore/keda/v2@v2.21.0 h1:R6z2HZvstK4RLUMxroNACzBj74xGxt3kG59b5Xc+Xps= config/crd/bases keda.sh_scaledobjects.yaml
github.com/prometheus-operator/prometheus-operator@v0.85.0 h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s= example/prometheus-operator-crd monitoring.coreos.com_podmonitors.yaml monitoring.coreos.com_prometheusrules.yaml monitoring.coreos.com_servicemonitors.yaml
istio.io/api@v1.32.0 h1:37mJvg9I0biYZAEQF+MATs4FNeCpXEIVO3LFpVb6iNM= kubernetes customresourcedefinitions.gen.yaml
sigs.k8s.io/gateway-api@v1.6.3 h1:lKpJa5bGlraC/QeACvCpsHLdmO6y0iKfzVl6gzaFEYc= config/crd/standard gateway.networking.k8s.io_[!v]*.yaml
sigs.k8s.io/gateway-api-inference-extension@v1.5.0 h1:w9Awt60cmI1vM7Y6N81h8wDCBP0WkmxpdI7GKY0v070= config/crd/bases inference.networking.k8s.io_inferencepools.yaml
END
}
if [ "${1:-}" = --versions ]; then
  wanted | cut -d' ' -f1 | sed 's/@/ /'
  exit
fi
stamp=$(sha256sum "$0" | cut -c1-16)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/llm-extproc/kubernetes/crds-$stamp
if [ ! -e "$folder/complete" ]; then
  if [ "${1:-}" = --look ]; then
    echo "the kinds of gateways and operators are not downloaded" >&2
    exit 1
  fi
  command -v go >/dev/null || {
    echo "Go is needed to download the kinds of gateways and operators; install it, and run this again" >&2
    exit 1
  }
  mkdir -p "$folder"
  elsewhere=$(mktemp -d)
  trap 'rm -rf "$elsewhere"' EXIT
  wanted | while read -r module sum path files; do
    answer=$(cd "$elsewhere" && go mod download -json "$module")
    grep -qF "\"Sum\": \"$sum\"" <<<"$answer" || {
      echo "$module is not what it was: its sum is not $sum" >&2
      exit 1
    }
    from=$(sed -n 's/^\t"Dir": "\(.*\)",$/\1/p' <<<"$answer")
    (cd "$from/$path" && install -m 644 $files "$folder/")
  done
  touch "$folder/complete"
fi
echo "$folder"
