"""A session is an ssh connection to a host with an agent (cluster/agent.py) at its other end.

Nothing of a cluster file becomes part of a shell's text: the remote command is the same for all
hosts, and what differs is sent over its standard input."""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowspec.cluster import agent
from flowspec.cluster.hosts import Cluster, Host
from flowspec.errors import RankLost, UserError

BOOT = "import sys; r = sys.stdin.buffer; exec(r.read(int(r.readline())))"
"""The remote python reads the agent's text, whose length stands in a line before it, and is it."""
REMOTE = shlex.join(["python3", "-c", BOOT])
CONNECT = 10
"""A host must answer within so many seconds."""
OPTIONS = {
    "BatchMode": "yes",  # ask nothing: nobody may be there to answer
    "ConnectTimeout": CONNECT,
    "ServerAliveInterval": 3,
    "ServerAliveCountMax": 3,
}
TICK = 1.0
"""The agent hears from us every so many seconds."""
NO_COMMAND = 127
"""The remote shell's exit code for a command that it does not find."""
TOLD = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key is not the known one: if the machine "
     "was set up anew, forget the old key with ssh-keygen -R {ssh}, else do not trust it"),
    ("Host key verification failed", "its host key is not known here: run `ssh {login}` once, and "
     "compare the fingerprint it shows with the host's own"),
    ("Permission denied", "it does not let us in without a password: run `ssh-copy-id {login}`"),
)  # fmt: skip
"""These words of ssh's complaints are answered by what to do."""


def command(cluster: Cluster, host: Host) -> list[str]:
    """Return the argument vector that connects to a host and starts an agent there."""
    argv = ["ssh", "-T"]
    if cluster.ssh_config_path is not None:
        argv += ["-F", str(cluster.ssh_config_path)]
    for name, value in OPTIONS.items():
        argv += ["-o", f"{name}={value}"]
    argv += ["-p", str(host.ssh_port)] if host.ssh_port is not None else []
    argv += ["-l", host.user] if host.user is not None else []
    return [*argv, "--", host.ssh, REMOTE]


class Session:
    """A session sends requests to a host's agent, and puts what it tells into `events`.

    An event is a mapping with `event`, its name; the last one is `closed`."""

    def __init__(self, cluster: Cluster, host: Host):
        self.host = host
        self.events: queue.SimpleQueue[tuple[Session, dict[str, Any]]] = queue.SimpleQueue()
        self._writing, self._telling = threading.Lock(), threading.Lock()
        self._greeted = False
        self._closing = threading.Event()
        self._complaints: list[str] = []
        try:
            self._process = subprocess.Popen(
                command(cluster, host),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us, who then end it in order
            )
        except FileNotFoundError:
            raise UserError("ssh is not on the PATH: install an OpenSSH client") from None
        self._overhearing = threading.Thread(target=self._overhear, daemon=True)
        self._overhearing.start()
        for work in (self._listen, self._tick):
            threading.Thread(target=work, daemon=True).start()
        text = Path(agent.__file__).read_bytes()
        self._write(b"%d\n%b" % (len(text), text))

    # ---- asking
    def send(self, ask: str, data: bytes = b"", **request: Any) -> None:
        """Send a request, and after it its `data`. What became of it is told as an event."""
        self._write(json.dumps({"ask": ask, **request}).encode() + b"\n" + data)

    def ask(self, ask: str, **request: Any) -> dict[str, Any]:
        """Send a request and return the event that answers it.

        Raise UserError if the host refuses it or cannot be reached, and RankLost if the connection
        is lost."""
        self.send(ask, **request)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the next event. Raise as `ask` does."""
        _, event = self.events.get()
        if event["event"] == "refused":
            raise UserError(f"{self.host.shown}: {event['why']}")
        if event["event"] == "closed":
            raise self.loss()
        return event

    def loss(self) -> UserError | RankLost:
        """Return what is to be said of a connection that has ended by itself."""
        if self._greeted:
            return RankLost(f"{self.host.shown}: the ssh connection was lost{self._last()}")
        return UserError(f"{self.host.shown}: {self._unreachable()}")

    def _unreachable(self) -> str:
        host, said = self.host, "\n".join(self._complaints)
        login = f"{host.user}@{host.ssh}" if host.user else host.ssh
        login += f" -p {host.ssh_port}" if host.ssh_port else ""
        for words, advice in TOLD:
            if words in said:
                return advice.format(ssh=host.ssh, login=login)
        if self._process.returncode == NO_COMMAND:
            return "it has no python3 on the PATH of a command that comes by ssh: install one"
        return f"it cannot be reached{self._last() or ': ssh ended without a word'}"

    def _last(self) -> str:
        """Return the last line that ssh or the agent complained with."""
        return f": {self._complaints[-1].rstrip('.')}" if self._complaints else ""

    # ---- the connection
    def _write(self, data: bytes) -> None:
        """Write to the agent; that it is gone is told as an event."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError), self._writing:
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not self._greeted:
                self._greeted = line.rstrip(b"\r\n").endswith(agent.HELLO.encode())
                continue
            with suppress(ValueError):
                self._tell(json.loads(line))
        self._process.wait()
        self._overhearing.join(1.0)  # its last words say why
        self._tell({"event": "closed"})

    def _tell(self, event: dict[str, Any]) -> None:
        with self._telling:
            self.events.put((self, event))

    def _overhear(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = "".join(c for c in line.decode(errors="replace").strip() if c.isprintable())
            self._complaints = [*self._complaints, text][-20:] if text else self._complaints

    def _tick(self) -> None:
        while not self._closing.wait(TICK):
            self.send("tick")

    def lead_into(self, events: queue.SimpleQueue[tuple[Session, dict[str, Any]]]) -> None:
        """Put all further events, and what nobody has asked for yet, into this queue."""
        with self._telling:
            with suppress(queue.Empty):
                while True:
                    events.put(self.events.get_nowait())
            self.events = events

    # ---- its end
    def end(self) -> None:
        """Ask the agent to end its ranks and leave; `close` waits for that."""
        self._closing.set()
        threading.Thread(target=self.send, args=("end",), daemon=True).start()

    def close(self, seconds: float) -> bool:
        """Wait for the agent's end, and return whether it came in so many seconds."""
        try:
            self._process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            self._process.kill()  # the agent notices that, and leaves by itself
            self._process.wait()
            return False
