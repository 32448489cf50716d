#!/usr/bin/env bash
# Start this board's rank; the same line on each board but for RANK (0 first, which writes the text):
#   MASTER_ADDR=10.0.0.1 WORLD_SIZE=4 RANK=0 GLOO_SOCKET_IFNAME=eth0 bash scripts/run_jetson.sh CONFIG --prompt TEXT
# Without MASTER_ADDR all ranks run on this board. The options are run_pipe.sh's.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
several=()
if [ -n "${MASTER_ADDR:-}" ]; then
    for name in WORLD_SIZE RANK GLOO_SOCKET_IFNAME; do
        [ -n "${!name:-}" ] || { echo "flowspec: MASTER_ADDR is set and $name is not: see the first lines of scripts/run_jetson.sh" >&2; exit 2; }
    done
    several=(-m torch.distributed.run --nnodes "$WORLD_SIZE" --nproc-per-node 1 --node-rank "$RANK"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
bash "$root/scripts/jetson_setup.sh"
exec "$root/.venv/bin/python" "${several[@]}" "$root/launch/run.py" "$@"
