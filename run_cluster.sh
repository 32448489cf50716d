#!/usr/bin/env bash
# Set up if need be, then run over several machines: bash run_cluster.sh CLUSTER.yaml [CONFIG] [--dry-run] [run_pipe.sh's options]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/scripts/setup.sh" requirements.txt
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m flowspec cluster "$@"
