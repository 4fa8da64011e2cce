# shellcheck shell=bash
# Sourced after launch/setup.sh: gives `set_up_sglang`, and $sglang, a Python that has SGLang for CPUs.
#
# SGLANG_VENV names an environment that has it already; without it one is made in .cache/sglang.

sglang=${SGLANG_VENV:-.cache/sglang/venv}/bin/python

# set_up_sglang: makes the environment; quick when it is there already.
set_up_sglang() {
  local here=launch/sglang_cpu folder=.cache/sglang file interpreter=${PYTHON:-python3.11}
  if [[ ${SGLANG_VENV:-} ]]; then
    [[ -x $sglang ]] || fail "SGLANG_VENV=$SGLANG_VENV has no bin/python; unset it to have one made"
    return
  fi
  if cat "$here"/*.txt | cmp -s - "$folder/installed"; then return; fi
  "$interpreter" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' \
    >/dev/null 2>&1 || fail "SGLang for CPUs needs Python 3.11 with venv, and $interpreter is not \
that; install it (pyenv install 3.11, or apt-get install python3.11-venv) or name it: \
PYTHON=/path/to/python3.11"
  printf 'set-up: installing SGLang for CPUs into %s, 2.3 GB and some minutes\n' "$folder/venv"
  mkdir -p "$folder"
  "$interpreter" -m venv --clear "$folder/venv"
  for file in requirements.txt "requirements-alone.txt --no-deps"; do
    # shellcheck disable=SC2086
    "$sglang" -m pip install --quiet --disable-pip-version-check --requirement "$here"/$file ||
      fail "pip could not install $here/${file% *}, for the reason above; the same command tries again"
  done
  cat "$here"/*.txt >"$folder/installed"
}
