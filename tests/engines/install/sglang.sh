#!/usr/bin/env bash
# Installs SGLang for CPU into the cache, outside the checkout, and prints the folder of its Python
# environment. Needs some 8 GB, most of it torch, and gcc for a library that stands for the driver of a
# GPU: its functions only return an error, but without them the engine's kernels are not imported. uv
# keeps what it has downloaded, so that a stopped run goes on where it was.
# usage: sglang.sh             installs what is missing
#        sglang.sh --look      installs nothing; fails if something is missing
#        sglang.sh --versions  prints the engine with its version
#        sglang.sh --lock      renews sglang.txt from sglang.in
#        sglang.sh --python …  runs its Python with the arguments that follow
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
version=0.5.23
cache=${XDG_CACHE_HOME:-$HOME/.cache}/llm-extproc/engines
folder=$cache/sglang-$version
stamp=$(cat "$here/sglang.sh" "$here/sglang.txt" | sha256sum | cut -c1-16)
uv=${UV:-$root/.venv/bin/uv}

if [ "${1:-}" = --lock ]; then
  cd "$here"
  exec "$uv" pip compile --quiet --python 3.11 --python-platform x86_64-manylinux_2_34 --no-annotate \
    --no-emit-index-url --no-emit-find-links \
    --custom-compile-command 'tests/engines/install/sglang.sh --lock' -o sglang.txt sglang.in
fi
if [ "$(cat "$folder/complete" 2>/dev/null)" != "$stamp" ]; then
  if [ "${1:-}" = --look ]; then
    echo "SGLang $version is not installed" >&2
    exit 1
  fi
  echo "installing SGLang $version into $folder: some 8 GB ..." >&2
  command -v gcc >/dev/null || { echo "gcc is needed" >&2; exit 1; }
  mkdir -p "$folder"
  rm -f "$folder/complete"
  [ -x "$folder/bin/python" ] || "$uv" venv --quiet --python 3.11 "$folder" >&2
  "$uv" pip sync --quiet --compile-bytecode --python "$folder/bin/python" "$here/sglang.txt" >&2
  "$uv" pip install --quiet --no-deps --python "$folder/bin/python" "sglang==$version" >&2
  mkdir -p "$folder/driver"
  for name in cuCtxFromGreenCtx cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuDevResourceGenerateDesc \
    cuDevSmResourceSplitByCount cuDeviceGetDevResource cuDriverGetVersion cuGetErrorString \
    cuGetProcAddress_v2 cuGreenCtxCreate cuGreenCtxDestroy cuGreenCtxGetDevResource \
    cuPointerGetAttribute cuStreamCreate; do
    # 100 stands for "no device".
    echo "int $name(void) { return 100; }"
  done >"$folder/driver/driver.c"
  gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$folder/driver/libcuda.so.1" "$folder/driver/driver.c"
  echo "$stamp" >"$folder/complete.part"
  mv "$folder/complete.part" "$folder/complete"
fi
case "${1:-}" in
--versions) echo "SGLang $version" ;;
--python)
  shift
  LD_LIBRARY_PATH="$folder/driver" exec "$folder/bin/python" "$@"
  ;;
*) echo "$folder" ;;
esac
