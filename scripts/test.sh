#!/usr/bin/env bash
# Set up if need be, then lint and test: bash scripts/test.sh [pytest options, such as -m 'not slow']
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup.sh" requirements.txt requirements_plots.txt requirements_llama.txt requirements_offload.txt requirements_serve.txt requirements_dev.txt
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy flowspec
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # two at once: with two threads each they would wait for each other
exec "$python" -m pytest -n 2 --dist worksteal "$@"
