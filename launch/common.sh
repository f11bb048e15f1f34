# The other scripts source this file from the repository's root. It finds a Python, makes the virtual
# environment $venv (.venv by default), and installs the package at the versions in constraints/.
venv=${venv:-.venv}

fail() {
  echo "$0: $1" >&2
  exit 1
}

# Succeeds if $1 is a Python that can make a virtual environment. The check runs $1, because pyenv
# leaves shims for versions that are not installed.
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

# Prints the constraints file for Python $1 and the extras $2. A Python newer than 3.12 gets the pins
# of 3.12. Beam and the device runtimes need older packages, so they have files of their own.
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

# install EXTRAS REQUIREMENT...: installs each REQUIREMENT in turn, then the package with EXTRAS. It
# does nothing if setup.py and the constraints have not changed since the last install of EXTRAS.
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
    # pip applies constraints from the environment to its build environments too.
    # $requirement is unquoted, because --editable and its path are two words.
    PIP_CONSTRAINT=$constraints PIP_BUILD_CONSTRAINT=$constraints \
      $venv/bin/python -m pip install $requirement >$venv/install.log 2>&1 ||
      fail "pip could not install $requirement; its output is in $venv/install.log."
  done
  echo "$key" >"$stamp"
}
