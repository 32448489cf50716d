#!/usr/bin/env bash
# Set up if need be, then run: bash run_pipe.sh [CONFIG] [--prompt TEXT | --prompt-file FILE] [options] [key=value ...]
# or serve over HTTP:          bash run_pipe.sh serve [CONFIG] [--host ADDRESS] [--port N] [options] [key=value ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
more=(); if [ "${1:-}" = serve ]; then more=(requirements_serve.txt); fi
source "$root/scripts/setup.sh" requirements.txt ${more[@]+"${more[@]}"}
exec "$python" "$root/launch/run.py" "$@"
