# shellcheck shell=bash disable=SC2154  # root is set where this is sourced
# Sourced with the requirement files to install: makes .venv in $root where it is missing or out of date, sets $python.
python=$root/.venv/bin/python
wanted=$(cd "$root" && cat "$@" | cksum)
if [ "$(cat "$root/.venv/ready.$*" 2>/dev/null)" != "$wanted" ]; then
    base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "flowspec: $base is older than Python 3.10; set PYTHON to a newer one" >&2; exit 2; }
    echo "flowspec: setting up $root/.venv ($*; some minutes the first time)" >&2
    "$python" -m pip --version >/dev/null 2>&1 || "$base" -m venv --clear "$root/.venv"
    for file in "$@"; do
        "$python" -m pip install --quiet --disable-pip-version-check --progress-bar on -r "$root/$file" >&2
    done
    echo "$wanted" >"$root/.venv/ready.$*"
fi
