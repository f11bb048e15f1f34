# Sourced by the scripts beside it, from the repository's root: finds a Python, makes an environment
# ($venv, .venv unless set before) and installs the package there at the versions pinned in
# constraints/. What is missing is said in one line.
venv=${venv:-.venv}

fail() {
  echo "$0: $1" >&2
  exit 1
}

# Succeeds if $1 is a Python that can make a virtual environment. A pyenv shim for a version that is
# not installed exists and fails, so it is run.
suitable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in python3.12 python3.11 python3 python; do
    if suitable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python >= 3.11 with its venv module among python3.12, python3.11, python3 and python;\
 install one (Debian, Ubuntu: apt install python3.12-venv)."
}

# Prints the constraints file for Python $1 and the extras $2; a Python newer than the pinned ones
# gets the newest. Beam and the runtimes for devices hold packages back, so that they have versions of
# their own.
constraints_for() {
  local minor
  minor=$("$1" -c 'import sys; print(sys.version_info[1])')
  if [ "$2" = beam ]; then
    echo constraints/beam.txt
  elif [[ $2 = *export* ]]; then
    echo constraints/export.txt
  elif [ "$minor" = 11 ]; then
    echo constraints/py311.txt
  else
    echo constraints/py312.txt
  fi
}

# install EXTRAS REQUIREMENT...: installs the REQUIREMENTs one after the other, then the package with
# EXTRAS. Does nothing if the last install of EXTRAS was from the same setup.py and constraints.
install() {
  local extras=$1 python output constraints stamp key requirement
  shift
  if ! suitable $venv/bin/python; then
    python=$(find_python)
    output=$("$python" -m venv --clear $venv 2>&1) ||
      fail "$python could not make the virtual environment $venv: ${output##*$'\n'}"
  fi

  constraints=$(constraints_for "$venv/bin/python" "$extras")
  stamp=$venv/installed-${extras:-runtime}
  key=$({ cat setup.py "$constraints" && echo "$extras $* $PWD"; } | cksum)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
    return
  fi

  echo "Installing into $venv; pip's output goes to $venv/install.log."
  for requirement in "$@" "--editable .${extras:+[$extras]}"; do
    # Through the environment, because pip then holds its build environments to the pins as well.
    # Unquoted: --editable and its path are two words.
    PIP_CONSTRAINT=$constraints PIP_BUILD_CONSTRAINT=$constraints \
      $venv/bin/python -m pip install $requirement >$venv/install.log 2>&1 ||
      fail "pip could not install $requirement; its output is in $venv/install.log."
  done
  echo "$key" >"$stamp"
}
