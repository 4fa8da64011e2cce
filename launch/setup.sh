# shellcheck shell=bash
# Sourced by the other scripts: goes to the repository, gives them `set_up`, `fail` and $python.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=.venv/bin/python

# fail TEXT: one line, exit status 2.
fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# find_python: prints an interpreter from 3.11 on that can make an environment; $PYTHON if that is set.
find_python() {
  local candidate candidates=(python3.12 python3.11 python3.13 python3.14 python3)
  if [[ ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python from 3.11 on, with venv, among ${candidates[*]}; install one (apt-get install \
python3.12-venv) or name it: PYTHON=/path/to/python"
}

# set_up FILE: makes .venv with what the requirements in FILE list; quick when they are there already.
set_up() {
  local file=$1 stamp=.venv/installed-$1 interpreter
  if ! "$python" -c 'import pip' >/dev/null 2>&1; then
    interpreter=$(find_python)
    printf 'set-up: making .venv with %s (%s)\n' "$("$interpreter" --version)" "$interpreter"
    "$interpreter" -m venv --clear .venv
  fi
  if ! cat requirements.txt "$file" | cmp -s - "$stamp"; then
    printf 'set-up: installing %s into .venv, which takes some minutes\n' "$file"
    "$python" -m pip install --quiet --disable-pip-version-check --requirement "$file" ||
      fail "pip could not install $file, for the reason above; the same command tries again"
    cat requirements.txt "$file" >"$stamp"
  fi
}
