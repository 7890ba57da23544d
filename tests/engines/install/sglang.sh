#!/usr/bin/env bash
# Installs SGLang for CPU into the cache, outside the checkout, and prints the folder of its Python
# environment. Needs some 7 GB, most of it torch, and a C compiler; uv keeps what it has downloaded,
# so that a stopped run goes on where it was. Servers need LD_LIBRARY_PATH=FOLDER/stub.
# usage: sglang.sh             installs what is missing
#        sglang.sh --look      installs nothing; fails if something is missing
#        sglang.sh --versions  prints the engine with its version
#        sglang.sh --lock      renews sglang.txt from sglang.in
set -euo pipefail
cd "$(dirname "$0")"
root=$(cd ../../.. && pwd)
version=0.5.23
cache=${XDG_CACHE_HOME:-$HOME/.cache}/llm-extproc/engines
folder=$cache/sglang-$version
stamp=$(cat sglang.sh sglang.txt libcuda.c | sha256sum | cut -c1-16)
uv=${UV:-$root/.venv/bin/uv}

# uv looks for a Python on the PATH, where those of pyenv are not, and then downloads one.
python() {
  local found
  for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11.*/bin/python3.11; do
    [ -x "$found" ] && echo "$found" && return
  done
  echo 3.11
}

if [ "${1:-}" = --lock ]; then
  exec "$uv" pip compile --quiet --python "$(python)" --python-platform x86_64-manylinux_2_34 \
    --no-annotate --no-emit-index-url --no-emit-find-links \
    --custom-compile-command 'tests/engines/install/sglang.sh --lock' -o sglang.txt sglang.in
fi
if [ "$(cat "$folder/complete" 2>/dev/null)" != "$stamp" ]; then
  if [ "${1:-}" = --look ]; then
    echo "SGLang $version is not installed" >&2
    exit 1
  fi
  compiler=$(command -v cc || command -v gcc || command -v clang) || {
    echo "SGLang needs a stub of libcuda.so.1: install a C compiler (cc, gcc or clang)" >&2
    exit 1
  }
  echo "installing SGLang $version into $folder: some 7 GB ..." >&2
  mkdir -p "$folder/stub"
  rm -f "$folder/complete"
  [ -x "$folder/bin/python" ] || "$uv" venv --quiet --allow-existing --python "$(python)" "$folder" >&2
  "$uv" pip sync --quiet --compile-bytecode --python "$folder/bin/python" sglang.txt >&2
  # Its own requirements want CUDA.
  "$uv" pip install --quiet --compile-bytecode --no-deps --python "$folder/bin/python" \
    "sglang==$version" >&2
  "$compiler" -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$folder/stub/libcuda.so.1" libcuda.c
  echo "$stamp" >"$folder/complete.part"
  mv "$folder/complete.part" "$folder/complete"
fi
if [ "${1:-}" = --versions ]; then
  echo "SGLang $version"
else
  echo "$folder"
fi
