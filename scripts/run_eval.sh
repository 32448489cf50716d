#!/usr/bin/env bash
# Set up if need be, then ask the questions of all datasets: bash scripts/run_eval.sh CONFIG|CLUSTER.yaml --out DIR [flowspec eval's options]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup.sh" requirements.txt requirements_plots.txt
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -f "${1:-}" ] && grep -q '^hosts:' "$1"; then
    exec "$python" -m flowspec cluster eval "$@"
fi
exec "$python" -m flowspec eval "$@"
