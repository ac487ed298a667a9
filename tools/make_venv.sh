#!/usr/bin/env bash
# Build the Python environment of this project: an exact copy of requirements.lock, one folder for all clones.
#
#   tools/make_venv.sh [VENV]       build it unless it is there (an interrupted build is taken up again)
#   tools/make_venv.sh --print      print the default folder only, build nothing
#
# PYTHON=python3.12 picks another interpreter; the folder's name depends on its version and on the pins.
set -euo pipefail
unset PYTHONPATH PYTHONHOME

readonly NEEDED_GB=16 # 11 when finished, the rest is for pip's downloads while it works
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
lock="$repo/requirements.lock"
python=${PYTHON:-python3.11}

say() { printf '[venv] %s\n' "$*" >&2; }
die() { printf '[venv] error: %s\n' "$*" >&2; exit 1; }

python_version() { "$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

default_folder() {
    local key
    key=$({ cat "$lock"; python_version || echo "$python"; } | sha256sum | cut -c1-12)
    echo "${XDG_CACHE_HOME:-$HOME/.cache}/anchortp-sglang/venv-$key"
}

check_interpreter() {
    command -v "$python" >/dev/null ||
        die "$python is not on PATH; install Python 3.11 or set PYTHON=<interpreter> (3.11 or later)"
    local version
    version=$(python_version) || die "$python does not run: $("$python" -V 2>&1 | head -n 1)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$python is Python $version; SGLang 0.5.23 needs 3.11 or later (set PYTHON=<interpreter>)"
    [[ $version == 3.11 ]] || say "note: requirements.lock was made with Python 3.11, this is $version"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python has no venv module; install it (Debian and Ubuntu: apt-get install python$version-venv)"
}

check_disk() {
    local free_kb used_kb
    free_kb=$(df -Pk "$1" | awk 'NR == 2 { print $4 }')
    used_kb=$(du -sk "$1" | cut -f1)
    ((free_kb + used_kb >= NEEDED_GB * 1024 * 1024)) ||
        die "$1 has $((free_kb / 1024 / 1024)) GB free, $NEEDED_GB GB are needed: free some, or set XDG_CACHE_HOME"
}

create() {
    if "$1/bin/python" -m pip --version >/dev/null 2>&1; then
        say "step 1 of 3: taking up the unfinished $1"
    else
        say "step 1 of 3: creating $1 with $("$python" -V)"
        "$python" -m venv --clear "$1"
    fi
}

# pip unpacks gigabytes: inside the folder, they are cleared with it when a build was killed.
pip_install() {
    local venv=$1
    shift
    rm -rf "$venv/.tmp" && mkdir "$venv/.tmp"
    TMPDIR="$venv/.tmp" PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$venv/bin/python" -m pip install --no-deps "$@" >&2 ||
        die "pip failed, see above; run the same command again to go on where it stopped"
    rm -rf "$venv/.tmp"
}

# Prints the pins that are missing, of another version, or lack a file: what pip calls installed may be
# half a package, if an earlier build was killed.
broken_pins() {
    "$1/bin/python" - "$lock" <<'PY'
import importlib.metadata as metadata
import sys

for pin in open(sys.argv[1]):
    pin = pin.partition("#")[0].strip()
    if not pin:
        continue
    name, version = pin.split("==")
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        print(pin)
        continue
    complete = package.files is not None and all(file.locate().exists() for file in package.files)
    if package.version != version or not complete:
        print(pin)
PY
}

install_pins() {
    local venv=$1 broken pins
    say "step 2 of 3: installing $(grep -c '^[^#]' "$lock") packages (11 GB, several minutes)"
    pip_install "$venv" -r "$lock"
    say "step 3 of 3: checking every file of every package"
    broken=$(broken_pins "$venv")
    if [[ -n $broken ]]; then
        mapfile -t pins <<<"$broken"
        say "installing anew what an interrupted build left incomplete: ${pins[*]}"
        pip_install "$venv" --ignore-installed "${pins[@]}"
        broken=$(broken_pins "$venv")
        [[ -z $broken ]] || die "still incomplete: $broken; delete $venv and run again"
    fi
    "$venv/bin/python" -m pip check >&2 || die "the pins contradict each other; see above"
}

if [[ ${1:-} == --print ]]; then
    default_folder
    exit
fi
venv=${1:-$(default_folder)}
[[ -e $venv/.complete ]] && exit 0

check_interpreter
mkdir -p "$venv"
# The lock is inherited by pip: a pip that outlives a killed build is waited for, not raced.
exec 9>"$venv.lock"
flock --nonblock 9 || { say "another build of $venv is running; waiting for it"; flock 9; }
[[ -e $venv/.complete ]] && exit 0
check_disk "$venv"
create "$venv"
install_pins "$venv"
date -u +%FT%TZ >"$venv/.complete"
say "ready in $SECONDS s: $venv"
