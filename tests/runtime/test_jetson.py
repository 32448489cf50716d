"""scripts/jetson_setup.sh and run_jetson.sh: what they refuse here, and what they do on a board that is played.

A board is played by a copy of /etc with its release file, in a mount namespace of the test's own, and by a Python that
notes what it is asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "# R{0} (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
NAMESPACE = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc && exec "$@"']
FAKE = """#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
    *ensurepip*) exit ${OLD:-0} ;;
    "-m venv"*) mkdir -p "$4/bin" "$4/site/torch/lib" && cp "$0" "$4/bin/python" ;;
    *"pip --version"*) exit 0 ;;
    *"pip install"*) echo "pip $*" >>"$NOTES"
        case "$*" in *cudss*) mkdir -p "$here/../site/nvidia/cu12/lib" && touch "$here/../site/nvidia/cu12/lib/libcudss.so.0" ;; esac ;;
    *purelib*) echo "$here/../site" ;;
    *device=*) [ -e "$here/../site/torch/lib/libcudss.so.0" ] || [ -z "$LACKS" ] || { echo "ImportError: $LACKS" >&2; exit 1; } ;;
    *is_gloo*) exit ${NO_GLOO:-0} ;;
    *__version__*) echo torch 2.8.0 ;;
    *launch/run.py*) echo "run $*" ;;
esac
"""


def script(name, *words, root=ROOT, prefix=(), **environment):
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHON", "MASTER_ADDR", "RANK", "WORLD_SIZE")
    }
    return subprocess.run(
        [*prefix, "bash", str(root / "scripts" / name), *words],
        capture_output=True, text=True, env=clean | environment, timeout=60,
    )  # fmt: skip


@pytest.fixture
def board(tmp_path):
    """`board(name, ..., release=36)`: run a script of a copy of this checkout on a played board; `board.notes()` are its installs."""
    tried = subprocess.run([*NAMESPACE, "/etc", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no mount namespace of its own: {tried.stderr.strip()}")
    root, etc, notes = tmp_path / "flowspec", tmp_path / "etc", tmp_path / "notes"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("*.py"))
    shutil.copy(ROOT / "requirements_jetson.txt", root)
    etc.mkdir()
    for file in ("passwd", "group", "ld.so.cache"):
        shutil.copy(Path("/etc") / file, etc)
    python = tmp_path / "python3.10"
    python.write_text(FAKE)
    python.chmod(0o755)

    def run(name, *words, release=36, **environment):
        (etc / "nv_tegra_release").write_text(RELEASE.format(release))
        environment = {"PYTHON": str(python), "NOTES": str(notes), "LACKS": "", **environment}
        return script(name, *words, root=root, prefix=[*NAMESPACE, str(etc)], **environment)

    run.notes = lambda: notes.read_text().splitlines() if notes.exists() else []
    return run


@pytest.mark.parametrize("name", ["jetson_setup.sh", "run_jetson.sh"])
def test_another_machine_is_refused_in_one_line(name):
    if Path("/etc/nv_tegra_release").exists():
        pytest.skip("this is a Jetson")
    found = script(name)
    [line] = found.stderr.splitlines()
    assert found.returncode == 2 and not found.stdout
    assert line.startswith("flowspec: this is no Jetson (/etc/nv_tegra_release is missing)")


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "RANK", "GLOO_SOCKET_IFNAME"])
def test_a_rank_among_several_boards_needs_its_place(missing):
    given = {
        "MASTER_ADDR": "10.0.0.1",
        "WORLD_SIZE": "3",
        "RANK": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    found = script("run_jetson.sh", **{k: "" if k == missing else v for k, v in given.items()})
    [line] = found.stderr.splitlines()
    assert found.returncode == 2 and f"{missing} is not" in line


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"release": 35}, "this Jetson has L4T R35.4.3, and this set-up is for JetPack 6"),
        ({"OLD": "1"}, "sudo apt-get install python3.10 python3.10-venv"),
        ({"PYTHON": "no-such-python"}, "no-such-python is missing, not Python 3.10"),
        ({"LACKS": "libcublas.so.12: cannot open"}, "(ImportError: libcublas.so.12: cannot open): sudo apt-get install nvidia-jetpack"),
        ({"NO_GLOO": "1"}, "this build of torch has no gloo"),
    ],
)  # fmt: skip
def test_what_a_board_lacks_is_said_in_one_line(board, environment, said):
    found = board("jetson_setup.sh", **environment)
    *_, line = found.stderr.splitlines()
    assert found.returncode == 2 and line.startswith("flowspec: ") and said in line


def test_a_board_is_set_up_once_and_runs_its_rank(board):
    found = board("jetson_setup.sh", LACKS="libcudss.so.0: cannot open shared object file")
    assert found.returncode == 0 and "torch 2.8.0 on L4T R36.4.3 is ready" in found.stderr
    listed, beside = board.notes()
    assert listed.endswith("requirements_jetson.txt") and "--no-deps nvidia-cudss-cu12==" in beside
    alone = board("run_jetson.sh", "my.yaml", "--prompt", "a b")
    assert alone.stdout.split()[0] == "run" and alone.stdout.endswith(
        "launch/run.py my.yaml --prompt a b\n"
    )
    several = dict(MASTER_ADDR="10.0.0.1", WORLD_SIZE="3", RANK="1", GLOO_SOCKET_IFNAME="eth0")
    words = board("run_jetson.sh", "my.yaml", **several).stdout
    assert "--nnodes 3 --nproc-per-node 1 --node-rank 1 --master-addr 10.0.0.1" in words
    assert len(board.notes()) == 2  # nothing was installed again
