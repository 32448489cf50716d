"""The agent is the program that a launcher runs on a host, over ssh, for as long as a run lasts.

Its text is sent over the connection (cluster/ssh.py), so a host needs python3, and nothing of ours
beforehand. It takes requests as lines of JSON on standard input, and tells events as lines of JSON
on standard output: it compares and receives files, starts this host's ranks, passes on what they
print, and says how they ended. When the connection ends or falls silent it ends the ranks and
leaves.

It imports nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

HELLO = "flowspec-agent 1"
"""What precedes this line on standard output comes from the login shell's own files."""
SILENCE = 10.0
"""The launcher speaks every second; after so many seconds without a word it is gone."""
GRACE = 2.0
"""So many seconds lie between asking a rank to end and ending it."""
PIECE = 1 << 20
CACHE = ".sha256.json"
"""Hashes are kept by size and time of change, in the way of models/manifest.py."""
PROBE = """
import importlib.util, json, sys
wanted = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "yaml")
missing = [name for name in wanted if importlib.util.find_spec(name) is None]
print(json.dumps({"python": list(sys.version_info[:3]), "missing": missing}))
"""
SIOCGIFADDR = 0x8915


class Refused(Exception):
    """The host cannot do what is asked; the text is for the person at the launcher."""


# ---- files ---------------------------------------------------------------------------------------
def inside(folder: Path, name: str) -> Path:
    """Return the path of a file of the folder; raise Refused for a name that leads out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise Refused(f"{name} lies outside the folder")
    return folder / path


def hash_of(path: Path, digest: Any) -> Any:
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest


class Known:
    """Known hashes of the files of a folder, kept in a file in it."""

    def __init__(self, folder: Path):
        self._path = folder / CACHE
        self._lines: dict[str, list] = {}
        with contextlib.suppress(OSError, ValueError):
            lines = json.loads(self._path.read_bytes())
            self._lines = lines if isinstance(lines, dict) else {}

    def same(self, name: str, path: Path, size: int, sha256: str) -> bool:
        """Return whether the file is there and has this size and hash."""
        try:
            stat = path.stat()
        except OSError:
            return False
        if stat.st_size != size:
            return False
        line = [stat.st_size, stat.st_mtime_ns]
        known = self._lines.get(name)
        digest = known[2] if isinstance(known, list) and known[:2] == line else None
        digest = digest or hash_of(path, hashlib.sha256()).hexdigest()
        self._lines[name] = [*line, digest]
        return digest == sha256

    def learn(self, name: str, path: Path, sha256: str) -> None:
        stat = path.stat()
        self._lines[name] = [stat.st_size, stat.st_mtime_ns, sha256]

    def keep(self) -> None:
        if self._path.parent.is_dir():
            beside = self._path.with_name(CACHE + ".partial")
            beside.write_text(json.dumps(self._lines))
            os.replace(beside, self._path)


class Incoming:
    """A file that is being received: what has come lies beside its name, under its hash."""

    def __init__(self, path: Path, size: int, sha256: str):
        self._path, self._size, self._sha256 = path, size, sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(f"{path.name}.{sha256[:16]}.partial")
        self.offset = self._partial.stat().st_size if self._partial.exists() else 0
        if self.offset > size:
            self.again()
        self._digest = hashlib.sha256()
        if self.offset:
            hash_of(self._partial, self._digest)

    def again(self) -> None:
        """Forget what has come: it is not what was sent."""
        self._partial.unlink()
        self.offset, self._digest = 0, hashlib.sha256()

    def add(self, data: bytes) -> None:
        with open(self._partial, "ab") as file:
            file.write(data)
        self._digest.update(data)
        self.offset += len(data)

    def settle(self) -> bool:
        """Give the file its name if it is whole and right; return whether it was."""
        if self.offset != self._size or self._digest.hexdigest() != self._sha256:
            if self._partial.exists():
                self.again()
            return False
        self._partial.touch()
        os.replace(self._partial, self._path)
        return True


class Store:
    """The files of this host's folder, which is divided into parts: the names' first words.

    Each part has a cache of hashes of its own; stages.yaml's part is then one that a rank reads."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._known: dict[str, Known] = {}
        self._incoming: dict[str, tuple[Incoming, str]] = {}

    def _part(self, name: str) -> tuple[Known, str]:
        part, rest = name.split("/", 1) if "/" in name else ("", name)
        if part not in self._known:
            self._known[part] = Known(self._folder / part)
        return self._known[part], rest

    def missing(self, files: list) -> list:
        """Return [name, bytes already here] of the files that are not here, or not like that."""
        for name, size, sha256 in files:
            path = inside(self._folder, name)
            known, short = self._part(name)
            if not known.same(short, path, size, sha256):
                self._incoming[name] = (Incoming(path, size, sha256), sha256)
        self._keep()
        return [[name, incoming.offset] for name, (incoming, _) in self._incoming.items()]

    def add(self, name: str, data: bytes) -> None:
        self._incoming[name][0].add(data)

    def settle(self) -> list:
        """Return the names of what did not arrive as it was sent; the rest is in its place."""
        bad = []
        for name, (incoming, sha256) in self._incoming.items():
            if incoming.settle():
                known, short = self._part(name)
                known.learn(short, inside(self._folder, name), sha256)
            else:
                bad.append(name)
        self._incoming = {name: self._incoming[name] for name in bad}
        self._keep()
        return bad

    def _keep(self) -> None:
        for known in self._known.values():
            known.keep()


# ---- this host -----------------------------------------------------------------------------------
def interfaces() -> dict[str, str]:
    """Return the first IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(reply[20:24])
    return found


def interface_for(wanted: str | None, address: str) -> str:
    """Return the interface that the ranks' traffic uses: the wanted one, or that of the address."""
    here = interfaces()
    listed = ", ".join(f"{name} {own}" for name, own in here.items())
    if wanted is not None:
        if wanted not in here:
            raise Refused(f"interface {wanted} has no IPv4 address here; there are {listed}")
        return wanted
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(address)
    for name, own in here.items():
        if own == address:
            return name
    raise Refused(f"no interface has the address {address}: set interface; there are {listed}")


def python_of(folder: Path, named: str) -> str:
    """Return the path of the ranks' python; raise Refused unless it can run them."""
    python = os.path.expanduser(named)
    if "/" in python:
        python = str(folder / python)
    elif not shutil.which(python):
        raise Refused(f"python {named} is not on the PATH")
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, timeout=60)
        facts = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise Refused(f"python {python} cannot be run: {error}") from None
    if facts["python"] < [3, 10]:
        version = ".".join(map(str, facts["python"]))
        raise Refused(f"python {python} is {version}: 3.10 or newer is needed")
    if facts["missing"]:
        missing = ", ".join(facts["missing"])
        raise Refused(f"python {python} has no {missing}: install requirements.txt there")
    return python


class Notes:
    """A file to which a rank here appends; what it grows by is told before what the rank says
    after it."""

    EVERY = 0.2
    """It is also looked at every so many seconds, whether or not anything is said."""

    def __init__(self, path: Path, tell: Any):
        self._path, self._tell = path, tell
        self._told = path.stat().st_size
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def tell(self) -> None:
        with self._lock, contextlib.suppress(OSError), open(self._path, "rb") as file:
            file.seek(self._told)
            if data := file.read():
                self._told += len(data)
                self._tell(event="noted", data=base64.b64encode(data).decode())

    def _watch(self) -> None:
        while True:
            time.sleep(self.EVERY)
            self.tell()


class Ranks:
    """The ranks that run here: processes, each with a process group of its own."""

    def __init__(self, tell: Any):
        self._tell = tell
        self._notes: dict[int, Notes] = {}
        self._folder = tempfile.mkdtemp(prefix="flowspec-")
        self._report = Path(self._folder) / "report"
        self._processes: dict[int, subprocess.Popen] = {}
        self._lock = threading.Lock()
        self._ending = False

    def start(
        self, rank: int, argv: list, env: dict, cwd: Path, talks: bool, notes: Path | None
    ) -> None:
        """Start a rank; it reads what is typed if it `talks`, and what it appends to `notes` is
        told."""
        with self._lock:
            if self._ending:
                return
            if notes:
                self._notes[rank] = Notes(notes, self._tell)
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                env={**os.environ, **env, "FLOWSPEC_REPORT": str(self._report)},
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            self._processes[rank] = process
        readers = [
            threading.Thread(target=self._pass_on, args=(rank, name, stream), daemon=True)
            for name, stream in (("out", process.stdout), ("err", process.stderr))
        ]
        for reader in readers:
            reader.start()
        threading.Thread(target=self._await, args=(rank, process, readers), daemon=True).start()

    def _pass_on(self, rank: int, name: str, stream: BinaryIO) -> None:
        while data := os.read(stream.fileno(), 1 << 16):
            if rank in self._notes:
                self._notes[rank].tell()
            self._tell(event="said", rank=rank, stream=name, data=base64.b64encode(data).decode())

    def _await(self, rank: int, process: subprocess.Popen, readers: list) -> None:
        code = process.wait()
        _signal(process, signal.SIGKILL)  # what it started itself
        for reader in readers:
            reader.join(1.0)
        self._tell(event="ended", rank=rank, code=code, words=self._words())

    def _words(self) -> str:
        """Return the first line that a rank here left for its launcher."""
        with contextlib.suppress(OSError, IndexError):
            return self._report.read_text().splitlines()[0]
        return ""

    def type(self, rank: int, data: bytes | None) -> None:
        """Pass on what was typed; None is its end."""
        stream = self._processes[rank].stdin
        assert stream is not None
        with contextlib.suppress(OSError, ValueError):  # the rank reads no more
            if data is None:
                stream.close()
            else:
                stream.write(data)
                stream.flush()

    def end(self) -> None:
        """End all ranks, and what they started."""
        with self._lock:
            self._ending = True
        running = [process for process in self._processes.values() if process.poll() is None]
        for process in running:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and any(p.poll() is None for p in running):
            time.sleep(0.02)
        for process in running:
            _signal(process, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


# ---- the conversation ----------------------------------------------------------------------------
class Agent:
    """The agent answers requests in their order; each is a method of the same name."""

    REQUESTS = ("hello", "compare", "put", "settle", "start", "type", "fetch", "tick")

    def __init__(self, requests: BinaryIO, events: int):
        self._requests, self._events = requests, events
        self._telling = threading.Lock()
        self._heard = time.monotonic()
        self._waiting = True
        self._ranks = Ranks(self._tell)
        self._leaving = threading.Lock()
        self._folder = Path()
        self._python = ""

    def serve(self) -> NoReturn:
        os.write(self._events, f"{HELLO}\n".encode())
        threading.Thread(target=self._watch, daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._told_to_leave)
        while True:
            self._waiting = True
            line = self._requests.readline()
            self._heard, self._waiting = time.monotonic(), False
            request = json.loads(line) if line.endswith(b"\n") else {"ask": "end"}
            name = request.pop("ask")
            if name not in self.REQUESTS:
                self._leave()
            try:
                getattr(self, name)(**request)
            except (Refused, OSError) as error:
                self._tell(event="refused", why=str(error))

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._heard, self._waiting = time.monotonic(), True
            piece = self._requests.read(min(1 << 16, size - len(data)))
            if not piece:
                self._leave()
            data += piece
        self._waiting = False
        return bytes(data)

    def _watch(self) -> None:
        """Leave once the launcher is silent while it is its turn."""
        while not (self._waiting and time.monotonic() - self._heard > SILENCE):
            time.sleep(0.5)
        self._leave()

    def _tell(self, **event: object) -> None:
        line = json.dumps(event).encode() + b"\n"
        try:
            with self._telling:
                while line:
                    line = line[os.write(self._events, line) :]
        except OSError:
            self._leave()

    def _told_to_leave(self, *_: object) -> None:
        """Leave in another thread: this one may be at it already."""
        threading.Thread(target=self._leave).start()

    def _leave(self) -> NoReturn:
        if not self._leaving.acquire(blocking=False):
            while True:  # another thread is at it
                time.sleep(1.0)
        self._ranks.end()
        os._exit(0)

    # the requests
    def tick(self) -> None:
        """Nothing is asked: the launcher is there."""

    def hello(self, folder: str, python: str, interface: str | None, address: str) -> None:
        self._folder = Path(os.path.expanduser(folder)).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._store = Store(self._folder)
        self._python = python_of(self._folder, python)
        self._interface = interface_for(interface, address)
        self._tell(event="ready", interface=self._interface)

    def compare(self, files: list) -> None:
        missing = self._store.missing(files)
        sizes = {name: size for name, size, _ in files}
        needed = sum(sizes[name] - offset for name, offset in missing)
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            mega = f"{needed / 1e6:.0f} MB are to be copied to {self._folder}"
            raise Refused(f"{mega}, where {free / 1e6:.0f} MB are free")
        self._tell(event="missing", files=missing)

    def put(self, name: str, size: int) -> None:
        self._store.add(name, self._read(size))

    def settle(self) -> None:
        self._tell(event="settled", bad=self._store.settle())

    def start(
        self,
        rank: int,
        argv: list,
        env: dict,
        code: str,
        talks: bool,
        notes: str | None,
        secret: str,
    ) -> None:
        own = {
            "GLOO_SOCKET_IFNAME": self._interface,
            "FLOWSPEC_LISTEN": interfaces()[self._interface],
            "FLOWSPEC_SECRET": secret,
            "FLOWSPEC_SECRET_FILE": "",
            "PYTHONPATH": str(self._folder / code),
        }
        kept = None if notes is None else inside(self._folder, notes)
        self._ranks.start(rank, [self._python, *argv], {**env, **own}, self._folder, talks, kept)

    def type(self, rank: int, typed: str | None) -> None:
        self._ranks.type(rank, None if typed is None else base64.b64decode(typed))

    def fetch(self, name: str) -> None:
        with open(inside(self._folder, name), "rb") as file:
            while piece := file.read(PIECE):
                self._tell(event="piece", data=base64.b64encode(piece).decode())
        self._tell(event="fetched")


def main() -> NoReturn:
    """Serve on this process's standard streams, which nobody else may then use."""
    requests, events = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)
    Agent(requests, events).serve()


if __name__ == "__main__":
    main()
