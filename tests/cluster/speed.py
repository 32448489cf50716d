"""Tokens a second of the demo in four stages on links that the rig's switch shapes, beside the same figures emulated and simulated.

`python -m tests.cluster.speed [--times 5]`, as root, on a quiet machine. The forwards are emulated on all three sides
(five ranks share this machine's cores); the links are the switch's on one side, `emulate`'s on the next, the simulator's on the last,
with the delay that is measured over the switch, which is a program and has its own."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.cluster.conftest import HOSTS, Site
from tests.cluster.rig import Rig
from tests.dist.conftest import ROOT

PROMPTS = ("class Stack:", "def binary_search(items, target):", "import json\n")
METHODS = ("ar", "flowspec")
FORWARD = ("emulate.stage_ms=12", "emulate.draft_ms=2")
TOKENS = "sampling.max_new_tokens=64"
LINKS = {
    "1 ms, 150 Mbps": dict(ms=1.0, mbps=150.0),
    "25 ms, 150 Mbps": dict(ms=25.0, mbps=150.0),
    "1 ms, 150 Mbps, 1% lost": dict(ms=1.0, mbps=150.0, loss=0.01),
}


ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 7001)) as door:
    print(flush=True)
    peer = door.accept()[0]
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := peer.recv(1):
        peer.sendall(data)
"""
ASK = """
import socket, statistics, sys, time
times, peer = [], socket.create_connection((sys.argv[1], 7001))
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in range(60):
    begun = time.monotonic()
    peer.sendall(b"x")
    peer.recv(1)
    times.append(time.monotonic() - begun)
print(statistics.median(times))
"""


def felt(rig: Rig) -> float:
    """Half the median round trip of a byte between two hosts, in ms, as the doctor measures it."""
    there = rig.within("h2", sys.executable, "-c", ECHO, rig.address("h2"))
    with subprocess.Popen(there, stdout=subprocess.PIPE) as echo:
        echo.stdout.readline()
        ask = rig.within("h1", sys.executable, "-c", ASK, rig.address("h2"))
        return float(subprocess.run(ask, capture_output=True, check=True).stdout) * 500


def emulated(ms: float, mbps: float) -> list[str]:
    return [f"emulate.link_ms={ms:.2f}", f"emulate.link_mbps={mbps}"]


def rates(path: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        found.setdefault(result["method"], []).append(result["tokens_per_second"])
    return found


def asked() -> list[str]:
    return [TOKENS, *(word for prompt in PROMPTS for word in ("--prompt", prompt))]


def far(site: Site, method: str) -> float:
    """The median of the prompts over the switch."""
    results = site.folder / "far.jsonl"
    words = [*asked(), "--method", method, *FORWARD, "--json", results]
    command = site.start(*words, heartbeat="2,60")
    assert command.end() == 0, command.err
    return statistics.median(rates(results)[method])


def near(site: Site, method: str, links: list[str]) -> float:
    """The same with `emulate`'s links, as processes on loopback."""
    site.alone(*asked(), "--method", method, *FORWARD, *links)
    return statistics.median(rates(site.folder / "alone.jsonl")[method])


def simulated(site: Site, *costs: object) -> dict[str, float]:
    """What the simulator says of these costs: emulated ones, or those that a run has measured."""
    results = site.folder / "simulated.jsonl"
    words = [*asked(), "--methods", ",".join(METHODS), *costs]
    drafts = ["--drafts", site.folder / "drafts.npz", "--json", results]
    argv = [sys.executable, "-m", "flowspec", "simulate", site.folder / "run.yaml", *words, *drafts]
    subprocess.run(list(map(str, argv)), cwd=ROOT, check=True, capture_output=True)
    return {method: statistics.median(found) for method, found in rates(results).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5, help="runs of each side (default 5)")
    times = parser.parse_args().times
    print(
        f"forwards emulated: {' '.join(FORWARD)}; medians of {times} runs (least..most), tokens/s"
    )
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "rig").mkdir()
        rig = stack.enter_context(Rig(folder / "rig", HOSTS, slow=True))
        site = Site(rig, folder, stack)
        for name, link in LINKS.items():
            rig.change(**{"loss": 0.0, **link})
            links = emulated(felt(rig), link["mbps"])
            said = simulated(site, *FORWARD, *links)
            print(f"{name}: as it is felt, {' '.join(links)}", flush=True)
            for method in METHODS:
                pairs = [(far(site, method), near(site, method, links)) for _ in range(times)]
                told = simulated(site, "--costs", site.folder / "far.jsonl")
                report(name, method, pairs, said[method], told[method])


def report(
    link: str, method: str, pairs: list[tuple[float, float]], said: float, told: float
) -> None:
    """`said` is simulated of the figures, `told` of the costs that the last run over the links measured."""
    sides = [
        f"{statistics.median(side):.1f} ({min(side):.1f}..{max(side):.1f})"
        for side in zip(*pairs, strict=True)
    ]
    ratio = statistics.median(a / b for a, b in pairs)
    real = statistics.median(a for a, _ in pairs)
    print(
        f"{link:24} {method:9} links {sides[0]:22} emulated {sides[1]:22} ratio {ratio:.2f}   "
        f"simulated {said:6.1f} ratio {real / said:.2f}   of measured costs {told:6.1f} ratio {real / told:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
