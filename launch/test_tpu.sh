#!/usr/bin/env bash
# Sets up .venv and a TPU compiler, which needs no TPU, and runs the tests that compile for TPUs.
#
#   launch/test_tpu.sh [PYTEST ARGUMENTS …]        for example -k orsta_3b
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up requirements-dev.txt
# Not into .venv: where JAX finds libtpu it looks for a TPU, and complains if there is none.
folder=$PWD/.cache/libtpu
wanted=$("$python" -c 'from importlib.metadata import requires
print(*[need.split(";")[0] for need in requires("jax") if need.startswith("libtpu")])')
if [[ $(cat "$folder/installed" 2>/dev/null) != "$wanted" ]]; then
  printf 'set-up: installing %s into %s\n' "$wanted" "$folder"
  rm -rf "$folder"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "$wanted" ||
    fail "pip could not install $wanted, for the reason above; the same command tries again"
  printf '%s\n' "$wanted" >"$folder/installed"
fi
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
# One process: a compilation takes both cores of a small machine.
exec "$python" -m pytest --numprocesses=0 -m tpu "$@"
