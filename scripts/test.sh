#!/usr/bin/env bash
# Set up if need be, then lint and test: bash scripts/test.sh [pytest options, such as -m 'not slow']
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup.sh" requirements.txt requirements_plots.txt requirements_llama.txt requirements_dev.txt
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy flowspec
exec "$python" -m pytest -n 2 --dist worksteal "$@"  # two at once: most of them wait or compute on one thread
