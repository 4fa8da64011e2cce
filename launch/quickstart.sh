#!/usr/bin/env bash
# Sets up .venv and runs the main job in miniature: 2 CPU cores are enough.
#
#   launch/quickstart.sh [--workdir=FOLDER] [--config.KEY=VALUE …]
#
# The flags are those of vtriune_jax.main, the keys those of configs/base.py; paths are relative to
# the repository. Ended at any moment, the same command continues.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

for flag; do
  if [[ $flag == --help || $flag == -h ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' launch/quickstart.sh
    exit
  fi
done
set_up requirements.txt
exec "$python" -m vtriune_jax.main \
  --config=configs/quickstart.py --workdir=runs/quickstart "$@"
