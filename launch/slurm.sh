#!/usr/bin/env bash
#SBATCH --job-name=flowspec
#SBATCH --ntasks-per-node=1
# A rank a node under Slurm: sbatch --nodes 5 launch/slurm.sh CONFIG --prompt TEXT (run_pipe.sh's options), from the
# checkout's folder, which all nodes see under this name. GLOO_SOCKET_IFNAME names the network interface.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?sbatch sets it: submit this script}"
export MASTER_ADDR MASTER_PORT FLOWSPEC_SECRET
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000))
# srun hands it on with the environment; docs/cluster.md, Trust
[ -n "${FLOWSPEC_SECRET_FILE-}" ] || : "${FLOWSPEC_SECRET:=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
# what is quoted is expanded on each node
exec srun --kill-on-bad-exit=1 bash -c 'exec .venv/bin/python -m torch.distributed.run --nnodes "$SLURM_NNODES" \
    --nproc-per-node 1 --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    launch/run.py "$@"' flowspec "$@"
