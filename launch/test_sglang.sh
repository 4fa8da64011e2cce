#!/usr/bin/env bash
# Sets up .venv and SGLang for CPUs, and runs the tests against real SGLang servers.
#
#   launch/test_sglang.sh [PYTEST ARGUMENTS …]        for example -k greedy
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=launch/sglang_cpu/setup.sh
source launch/sglang_cpu/setup.sh

set_up requirements-dev.txt
set_up_sglang
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# One process: the servers take both cores of a small machine, and 2 GB each.
exec "$python" -m pytest --numprocesses=0 -m sglang "$@"
