#!/usr/bin/env bash
# Set up a Jetson with JetPack 6: bash scripts/jetson_setup.sh. Makes .venv from the system's Python 3.10 with NVIDIA's torch
# and the rest of requirements_jetson.txt, then looks whether torch works here. What is done already is not done again;
# nothing is done as root: where root is needed, one line says what to run.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() { echo "flowspec: $1" >&2; exit 2; }

release=/etc/nv_tegra_release
[ -r "$release" ] || fail "this is no Jetson ($release is missing); on other machines run_pipe.sh sets up what it needs"
version=$(sed -n '1s/^# \(R[0-9]*\).*REVISION: \([0-9.]*\).*/\1.\2/p' "$release")
case "$version" in
    R36.*) ;;
    *) fail "this Jetson has L4T ${version:-(unknown)}, and this set-up is for JetPack 6 (L4T R36): flash that (NVIDIA's SDK Manager)" ;;
esac
export PYTHON=${PYTHON:-python3.10}
"$PYTHON" -c 'import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null \
    || fail "$PYTHON is missing, not Python 3.10, or without venv: sudo apt-get install python3.10 python3.10-venv"
source "$root/scripts/setup.sh" requirements_jetson.txt

works() { "$python" -c 'import torch; torch.ones(2, device="cuda").sum().item()' 2>&1; }
case "$(works || true)" in
    *libcudss*)  # NVIDIA's torch is linked to it, JetPack is without it, and torch looks beside itself
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps nvidia-cudss-cu12==0.6.0.5
        site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        ln -sfn "$site"/nvidia/*/lib/libcudss.so.0 "$site/torch/lib/libcudss.so.0" ;;
esac
said=$(works) || fail "torch does not compute on this board's GPU (${said##*$'\n'}): sudo apt-get install nvidia-jetpack, or see docs/jetson.md"
"$python" -c 'import torch.distributed as d, sys; sys.exit(not (d.is_available() and d.is_gloo_available()))' \
    || fail "this build of torch has no gloo, over which ranks talk: take another wheel (the torch line of requirements_jetson.txt)"
echo "flowspec: $("$python" -c 'import torch; print("torch", torch.__version__)') on L4T $version is ready; next: $python -m flowspec doctor" >&2
