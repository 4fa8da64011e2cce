#!/usr/bin/env bash
# Sets up .venv and runs every check: format, lint, types, scripts, tests.
#
#   launch/test.sh [PYTEST ARGUMENTS …]        for example -k boxes, or -m slow -n 0
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

check() {
  step=$*
  printf '\n== %s\n' "$step"
  "$@"
}

finish() {
  local status=$?
  if ((status)); then
    printf '\nlaunch/test.sh: FAILED at: %s\n' "$step"
  else
    printf '\nlaunch/test.sh: all checks passed in %d s\n' "$SECONDS"
  fi
}

step=set-up
trap finish EXIT
set_up requirements-dev.txt

export PATH="$PWD/.venv/bin:$PATH" PYRIGHT_PYTHON_IGNORE_WARNINGS=1
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
cores=$(getconf _NPROCESSORS_ONLN)

check ruff format --check .
check ruff check .
check python -m pyright --pythonpath "$python"
check shellcheck --external-sources launch/*.sh launch/*/*.sh .ci/run
# One file is tested by one process, so that its fixtures are made once; a process needs about 2 GB.
check python -m pytest --numprocesses="$((cores < 8 ? cores : 8))" --dist=loadfile --no-loadscope-reorder "$@"
