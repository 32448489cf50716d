#!/usr/bin/env bash
# Set up if need be, then run: bash run_pipe.sh [CONFIG] [--prompt TEXT | --prompt-file FILE] [options] [key=value ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/scripts/setup.sh" requirements.txt
exec "$python" "$root/launch/run.py" "$@"
