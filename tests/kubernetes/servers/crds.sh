#!/usr/bin/env bash
# Downloads the kinds of KEDA and of the Prometheus operator from the Go module registry, once, and
# prints the folder that has them. Separate from build.sh, since a build takes minutes.
# usage: crds.sh         downloads what is missing
#        crds.sh --look  downloads nothing; fails if something is missing
set -euo pipefail
# Module, its sum as in a go.sum, and the folder and names of the files that are used.
wanted() {
  cat <<'END'
github.com/kedacore/keda/v2@v2.21.0 h1:R6z2HZvstK4RLUMxroNACzBj74xGxt3kG59b5Xc+Xps= config/crd/bases keda.sh_scaledobjects.yaml
github.com/prometheus-operator/prometheus-operator@v0.85.0 h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s= example/prometheus-operator-crd monitoring.coreos.com_podmonitors.yaml monitoring.coreos.com_prometheusrules.yaml monitoring.coreos.com_servicemonitors.yaml
END
}
stamp=$(sha256sum "$0" | cut -c1-16)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/llm-extproc/kubernetes/crds-$stamp
if [ ! -e "$folder/complete" ]; then
  if [ "${1:-}" = --look ]; then
    echo "the kinds of operators are not downloaded" >&2
    exit 1
  fi
  command -v go >/dev/null || {
    echo "Go is needed to download the kinds of operators; install it, and run this again" >&2
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
    for file in $files; do
      install -m 644 "$from/$path/$file" "$folder/$file"
    done
  done
  touch "$folder/complete"
fi
echo "$folder"
