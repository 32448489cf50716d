"""Five hosts on one machine: network namespaces with an address, an sshd and a folder each, on a bridge of their own.

Nothing of it is outside its namespaces: a further one holds the bridge, and one the launcher. It needs root, iproute2 and sshd."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.cluster import switch

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
TOOLS = ("ip", "ssh", "ssh-keygen")
PATIENCE = 60.0
_numbers = itertools.count()


def lacking() -> str | None:
    """Why there can be no rig here; None if there can be one."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or SSHD is None:
        return f"{' '.join(missing) or 'sshd'} is not installed (iproute2, openssh-client, openssh-server)"
    probe = f"fs{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", probe], check=True)
        return None
    return f"ip netns add: {made.stderr.strip()}"


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


class Rig:
    """A rig of so many hosts, `h0` and on, at 10.77.0.10 and on, beside the launcher's `desk` at 10.77.0.2.

    They are on a bridge, whose links can be shaped and cut; or, if `slow`, on the switch of switch.py, which also delays and loses."""

    def __init__(self, folder: Path, hosts: int, slow: bool = False):
        self._slow = slow
        self._switch: subprocess.Popen | None = None
        self.folder, self.names = folder, [f"h{k}" for k in range(hosts)]
        self._mark = f"fs{os.getpid()}x{next(_numbers)}"
        self._sshds: list[subprocess.Popen] = []

    def address(self, name: str) -> str:
        return f"10.77.0.{2 if name == 'desk' else 10 + self.names.index(name)}"

    def space(self, name: str) -> str:
        """The network namespace of a host."""
        return f"{self._mark}-{name}"

    def home(self, name: str) -> Path:
        return self.folder / name

    def __enter__(self) -> "Rig":
        try:
            (self._plug_slow if self._slow else self._plug_all)()
            self._keys()
            for name in self.names:
                self._serve(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("desk", *self.names):
            for pid in self.pids(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for sshd in self._sshds:
            sshd.wait()
        if self._switch:
            self._switch.stdin.close()
            self._switch.wait()
        for name in ("switch", "desk", *self.names):
            subprocess.run(["ip", "netns", "del", self.space(name)], capture_output=True)

    def _plug_all(self) -> None:
        """All hosts on one bridge."""
        ip("netns", "add", self.space("switch"))
        ip("-n", self.space("switch"), "link", "add", "br0", "type", "bridge")
        ip("-n", self.space("switch"), "link", "set", "br0", "up")
        for name in ("desk", *self.names):
            self._plug(name)

    def _plug_slow(self) -> None:
        """All hosts on the switch in user space, whose devices are theirs."""
        names = ("desk", *self.names)
        for name in names:
            ip("netns", "add", self.space(name))
        words = [f"/run/netns/{self.space(name)}={self.address(name)}" for name in names]
        argv = [sys.executable, str(Path(switch.__file__)), *words]
        self._switch = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._switch.stdout.readline() == "ready\n"
        for name in names:
            self._address(name, mtu=switch.MTU)

    def _address(self, name: str, **more: object) -> None:
        """Give a host's eth0 its address."""
        space, words = self.space(name), [word for pair in more.items() for word in pair]
        ip("-n", space, "link", "set", "lo", "up")
        ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", *words, "up")

    def _plug(self, name: str) -> None:
        """A namespace with eth0, whose other end, of the host's name, is on the bridge."""
        space, switch = self.space(name), self.space("switch")
        ip("netns", "add", space)
        ip(
            "-n",
            switch,
            "link",
            "add",
            name,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            space,
        )
        ip("-n", switch, "link", "set", name, "master", "br0", "up")
        self._address(name)

    def _keys(self) -> None:
        for name in ("client", *self.names):
            path = self.folder / f"{name}.key"
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True
            )
        lines = [
            f"{self.address(n)} {(self.folder / f'{n}.key.pub').read_text()}" for n in self.names
        ]
        (self.folder / "known_hosts").write_text("".join(lines))
        (self.folder / "ssh_config").write_text(
            f"IdentityFile {self.folder}/client.key\nIdentitiesOnly yes\nStrictHostKeyChecking yes\n"
            f"UserKnownHostsFile {self.folder}/known_hosts\nGlobalKnownHostsFile /dev/null\n"
        )

    def _serve(self, name: str) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)  # its privilege separation wants it
        path = self.folder / f"{name}.sshd"
        path.write_text(
            f"ListenAddress {self.address(name)}\nHostKey {self.folder}/{name}.key\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self.folder}/client.key.pub\nStrictModes no\nPasswordAuthentication no\n"
            "PermitRootLogin prohibit-password\n"
        )
        with open(self.folder / f"{name}.sshd.log", "wb") as log:
            # with process ids of its own: a rank ends one that hangs if it is on the same machine
            own = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
            argv = self.within(name, *own, SSHD, "-D", "-e", "-f", path)
            self._sshds.append(subprocess.Popen(argv, stderr=log, stdin=subprocess.DEVNULL))
        deadline = time.monotonic() + PATIENCE
        while "Server listening" not in (said := (self.folder / f"{name}.sshd.log").read_text()):
            assert time.monotonic() < deadline and self._sshds[-1].poll() is None, said
            time.sleep(0.02)

    # ---- what a test does with it
    def within(self, name: str, *argv: object) -> list[str]:
        """The argument vector that runs a command in a host's namespace."""
        return ["ip", "netns", "exec", self.space(name), *map(str, argv)]

    def change(self, **links: object) -> None:
        """Change links of the switch in user space (switch.py)."""
        self._switch.stdin.write(json.dumps(links) + "\n")
        self._switch.stdin.flush()
        assert self._switch.stdout.readline() == "changed\n"

    def shape(self, name: str, rate: str) -> None:
        """Let a host send and receive at most so much, such as 150mbit."""
        limit = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms")
        for space, device in ((self.space(name), "eth0"), (self.space("switch"), name)):
            subprocess.run(
                ["tc", "-n", space, "qdisc", "replace", "dev", device, *limit], check=True
            )

    def cut(self, name: str, up: bool = False) -> None:
        """Take a host's cable out, or put it in again."""
        ip("-n", self.space("switch"), "link", "set", name, "up" if up else "down")

    def pids(self, name: str) -> list[int]:
        done = subprocess.run(
            ["ip", "netns", "pids", self.space(name)], capture_output=True, text=True
        )
        return [int(word) for word in done.stdout.split()]

    @property
    def listening(self) -> set[int]:
        """The process ids of the sshds that listen."""
        return {sshd.pid for sshd in self._sshds}

    def left(self) -> dict[int, str]:
        """What runs on the hosts beside sshd, which notices a cut link late: process id -> command."""
        found = {}
        for pid in (pid for name in self.names for pid in self.pids(name)):
            with suppress(OSError):  # it ended meanwhile
                words = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:100]
                )
                if words and "sshd" not in words:
                    found[pid] = words
        return found

    def wait_until_clean(self, seconds: float = PATIENCE) -> None:
        """Until nothing but sshd runs on any host."""
        deadline = time.monotonic() + seconds
        while left := self.left():
            assert time.monotonic() < deadline, f"left: {left}"
            time.sleep(0.05)

    def ranks(self) -> dict[int, int]:
        """The ranks that run: rank -> process id."""
        found = {}
        for pid in (pid for name in self.names for pid in self.pids(name)):
            with suppress(OSError):
                for fact in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if fact.startswith(b"RANK="):
                        found[int(fact[5:])] = pid
        return found
