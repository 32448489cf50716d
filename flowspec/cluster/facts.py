"""What one host says of itself, and what it does to measure the links to the others.

`flowspec doctor` sends the source of this file to each host's Python and then speaks with it: a
JSON object a line each way (`talk`). So it imports nothing but the standard library, takes torch
and flowspec where they are found, and is written for any Python from 3.8 on: of an older one than
flowspec needs, the doctor wants to hear, too. It ends when its input ends, so none is left behind
when a connection breaks.

It listens on the address it is told, never on all of them, and only while links are measured; who
does not prove to know the measurement's token is not answered."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import platform
import re
import shutil
import socket
import statistics
import struct
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

MARK = "flowspec-doctor "
"""An answer's line begins so; whatever else a login shell or a library prints is passed over."""
SIDE = 6144
"""Speed is measured with a matrix of SIDE x SIDE weights: more than most caches hold."""
ROWS = (1, 16)
"""So many rows are multiplied: one is bound by memory, many by arithmetic."""
TIMED = 0.1
"""The seconds that each speed is measured for."""
PINGS = 12
BLOCK = 1 << 16
NONCE, PROOF = 16, 32
"""A nonce and an HMAC with SHA-256 have so many bytes."""
MOST = 64 << 20
"""A link is measured with so many bytes at most."""
BEGUN = 0.1
"""The first seconds of a stream, in which it grows and buffers fill, are not counted,"""
LASTED = 0.9
"""nor is what comes behind this share of its bytes."""


# ---- what is installed ---------------------------------------------------------------------------
def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def flowspec_version() -> str | None:
    try:
        from flowspec.version import __version__
    except ImportError:
        return None
    return __version__


def torch_facts() -> dict:
    """Return what torch can do here; `broken` says why it cannot be imported."""
    found: dict = {"broken": None, "gloo": False, "nccl": False, "cuda": None, "gpus": []}
    if version_of("torch") is None:
        return found
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # of a wheel for another CUDA or Python: anything
        return {**found, "broken": f"{type(error).__name__}: {error}"[:300]}
    if dist.is_available():
        found.update(gloo=dist.is_gloo_available(), nccl=dist.is_nccl_available())
    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["gpus"] = [_gpu(torch, index) for index in range(torch.cuda.device_count())]
    return found


def _gpu(torch, index: int) -> dict:
    free, total = torch.cuda.mem_get_info(index)
    return {"name": torch.cuda.get_device_name(index), "free": free, "total": total}


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


def driver() -> str | None:
    """Return the version of NVIDIA's driver, or a Jetson's release, if there is one."""
    found = re.search(r"Kernel Module\D*([\d.]+)", _read("/proc/driver/nvidia/version"))
    release = re.match(r"# (R\d+) \(release\), REVISION: ([\d.]+)", _read("/etc/nv_tegra_release"))
    if release:
        return "L4T {}.{}".format(*release.groups())
    return found[1] if found else None


# ---- what there is room for ----------------------------------------------------------------------
def memory() -> dict:
    """Return the bytes of memory that are free and that there are; None where nobody says.

    A container's limit counts."""
    said = dict(re.findall(r"(\w+):\s+(\d+) kB", _read("/proc/meminfo")))
    free, total = (
        int(said[name]) * 1024 if name in said else None for name in ("MemAvailable", "MemTotal")
    )
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if free is not None and limit.isdigit() and used.isdigit():
        free, total = min(free, max(0, int(limit) - int(used))), min(total or 0, int(limit))
    return {"memory_free": free, "memory_total": total}


def disk(folder: Path) -> dict:
    """Return the free bytes where this folder is or will be, and whether it can be written."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return {
        "folder": str(folder),
        "disk_free": shutil.disk_usage(there).free,
        "writable": os.access(there, os.W_OK | os.X_OK) and there.is_dir(),
    }


def cores() -> dict:
    """Return how many cores there are, how many of them this process may use, and how many are
    busy."""
    count = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count)
    quota = re.match(r"(\d+) (\d+)", _read("/sys/fs/cgroup/cpu.max"))
    if quota:
        usable = min(usable, int(quota[1]) / int(quota[2]))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {"cores": count, "usable_cores": usable, "load": load}


# ---- the network ---------------------------------------------------------------------------------
def interfaces() -> list:
    """Return the network interfaces that are up, an entry an address; none off Linux."""
    return [
        {"name": name, "address": address, "loopback": _is_loopback(address)}
        for name, address in [*_four(), *_six()]
    ]


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _four() -> list:
    """Return the names and IPv4 addresses of interfaces, as the kernel lists them (SIOCGIFCONF)."""
    if sys.platform != "linux":
        return []
    import array
    import fcntl

    size = 40  # bytes of a struct ifreq: 16 of the name, 4 before the address
    room = array.array("B", bytes(256 * size))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        told = fcntl.ioctl(
            asked.fileno(), 0x8912, struct.pack("iP", len(room), room.buffer_info()[0])
        )
    listed = room.tobytes()[: struct.unpack("iP", told)[0]]
    entries = [listed[at : at + size] for at in range(0, len(listed), size)]
    return [
        (entry[:16].split(b"\0")[0].decode(), socket.inet_ntoa(entry[20:24])) for entry in entries
    ]


def _six() -> list:
    lines = [line.split() for line in _read("/proc/net/if_inet6").splitlines()]
    return [
        (line[5], socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line[0])))
        for line in lines
        if line[3] != "20"  # an address of the link alone
    ]


def resolved(name: str) -> list:
    """Return the addresses that this host knows for a name."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # no such host; no name
        return []
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def port_state(address: str, port: int) -> str:
    """Return "free", or why no one can listen there: "taken", or in the system's words."""
    try:
        _listening(address, port).close()
    except OSError as error:
        return "taken" if error.errno == 98 else str(error.strerror or error)
    return "free"


def _listening(address: str, port: int) -> socket.socket:
    if address in ("", "::", "0.0.0.0"):
        raise ValueError("nothing listens on all addresses")
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        made.listen(64)
    except OSError:
        made.close()
        raise
    return made


# ---- files ---------------------------------------------------------------------------------------
def files(root: Path, wanted: list) -> dict:
    """Return which of the wanted files are missing here, and which are other ones.

    `wanted` are [name, bytes, sha256], and a name's first part is a folder with hashes that
    flowspec has kept, which are believed while a file is unchanged."""
    kept: dict = {}
    found: dict = {"missing": [], "other": []}
    for name, size, sha256 in wanted:
        part, _, rest = name.partition("/")
        if part not in kept:
            kept[part] = _kept(root / part / ".sha256.json")
        state = _state(root / name, size, sha256, kept[part].get(rest))
        found.get(state, []).append(name)
    return found


def _kept(path: Path) -> dict:
    try:
        kept = json.loads(_read(str(path)))
    except ValueError:
        return {}
    return kept if isinstance(kept, dict) else {}


def _state(path: Path, size: int, sha256: str, kept: object) -> str:
    try:
        stat = path.stat()
        if stat.st_size != size:
            return "other"
        if isinstance(kept, list) and kept[:2] == [stat.st_size, stat.st_mtime_ns]:
            return "same" if kept[2:] == [sha256] else "other"
        digest = hashlib.sha256()
        with open(str(path), "rb", buffering=0) as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "other"
    return "same" if digest.hexdigest() == sha256 else "other"


# ---- speed ---------------------------------------------------------------------------------------
def speeds(threads: int) -> list:
    """Return the seconds that products with a matrix take, by device, dtype and rows.

    On a CPU the layers are those of flowspec's stages where these can be, else torch's."""
    try:
        import torch
    except Exception:
        return []
    torch.set_num_threads(threads)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    with torch.inference_mode():
        return [
            found
            for device in devices
            for dtype in ("float32", "bfloat16", "float16", "int8")
            for found in _speed(torch, device, dtype, threads)
        ]


def _speed(torch, device: str, dtype: str, threads: int) -> list:
    by, layer = _layer(torch, device, dtype)
    if layer is None:
        return []
    found = []
    for count in ROWS:
        kind = torch.float32 if by == "flowspec" else getattr(torch, dtype)
        rows = torch.randn(count, SIDE, device=device).to(kind)
        seconds = _timed(torch, device, lambda rows=rows: layer(rows))
        about = {"device": device, "dtype": dtype, "rows": count, "threads": threads, "by": by}
        found.append({**about, "weights": SIDE * SIDE, "seconds": seconds})
    return found


def _layer(torch, device: str, dtype: str) -> tuple:
    """Return who computes, and the layer; None where nobody can."""
    weight = torch.randn(SIDE, SIDE, device=device) / SIDE
    kind = getattr(torch, dtype)
    if device == "cpu":
        with contextlib.suppress(Exception):  # no flowspec, no llvmlite, no such processor
            from flowspec.models import jit
            from flowspec.models.kernels import PackedLinear

            if jit.available():
                return "flowspec", PackedLinear(weight, dtype=kind)
    if dtype == "int8":
        return "torch", None
    weight = weight.to(kind)
    return "torch", lambda rows: torch.nn.functional.linear(rows, weight)


def _timed(torch, device: str, work) -> float:
    """Return the least seconds that `work` takes: others may disturb it."""

    def once() -> float:
        begun = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    once()
    taken = [once()]
    while sum(taken) < TIMED or len(taken) < 3:
        taken.append(once())
    return min(taken)


# ---- what is asked -------------------------------------------------------------------------------
class Agent:
    """An agent answers what it is asked, by the methods' names."""

    def __init__(self) -> None:
        self._door: socket.socket | None = None

    def clock(self) -> dict:
        """Return the seconds since 1970 by this host's clock."""
        return {"time": time.time()}

    def facts(self, folder: str, code: str, wanted: list, names: list, port: list) -> dict:
        """Return the facts that take no time worth speaking of, but for hashes not yet known.

        Under `folder` are, or will be, flowspec in `code`, and the files `wanted`. `names` are to
        be resolved, and `port` [address, number] is to be tried; it may be empty."""
        root = Path(folder).expanduser()
        sys.path.insert(0, str(root / code))
        return {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "hostname": socket.gethostname(),
            "own_addresses": resolved(socket.gethostname()),
            "resolved": [{"name": name, "addresses": resolved(name)} for name in names],
            "flowspec": flowspec_version(),
            "torch": version_of("torch"),
            "transformers": version_of("transformers"),
            "driver": driver(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "gloo_interface": os.environ.get("GLOO_SOCKET_IFNAME"),
            "interfaces": interfaces(),
            "port": port_state(*port) if port else None,
            **torch_facts(),
            **memory(),
            **disk(root),
            **cores(),
            **files(root, wanted),
        }

    def lend(self, code: str) -> dict:
        """Take flowspec's modules, a zip file in base64, instead of those that are here, if any.

        They are gone with this process."""
        self._lent = tempfile.NamedTemporaryFile(suffix=".zip")  # noqa: SIM115
        self._lent.write(base64.b64decode(code))
        self._lent.flush()
        sys.path.insert(0, self._lent.name)
        for name in [name for name in sys.modules if name.split(".")[0] == "flowspec"]:
            del sys.modules[name]
        return {}

    def speeds(self, threads: int) -> dict:
        return {"speeds": speeds(threads)}

    def listen(self, address: str, port: int) -> dict:
        """Listen on this address, and this port or (0) one that is free; return the port."""
        self.close()
        self._door = door = _listening(address, port)
        return {"port": door.getsockname()[1]}

    def close(self) -> dict:
        """Listen no more."""
        if self._door:
            self._door.close()
        self._door = None
        return {}

    def knock(self, address: str, port: int, seconds: float) -> dict:
        """Raise OSError unless somebody listens there."""
        socket.create_connection((address, port), seconds).close()
        return {}

    def answer(self, token: str, seconds: float) -> dict:
        """Echo and count for the one that has the token; return what it sent, and how fast.

        It may take so many seconds to come, and the same again to send."""
        line = self._guest(bytes.fromhex(token), time.monotonic() + seconds)
        with line:
            line.settimeout(seconds)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while line.recv(1) == b"p":
                line.sendall(b"p")
            return _counted(line, time.monotonic() + seconds)

    def _guest(self, token: bytes, until: float) -> socket.socket:
        door = self._door
        if door is None:
            raise ValueError("nothing listens here")
        while True:
            door.settimeout(max(0.01, until - time.monotonic()))
            line, _ = door.accept()
            with contextlib.suppress(OSError):
                if _welcome(line, token):
                    return line
            line.close()

    def stream(self, address: str, port: int, token: str, patience: float, seconds: float) -> dict:
        """Measure the way to a host that answers there; return the ms of a short message, there.

        It may take `patience` seconds to connect or to answer; then bytes are sent for so many
        seconds, at most MOST of them."""
        with socket.create_connection((address, port), patience) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _enter(line, bytes.fromhex(token), patience)
            line.settimeout(patience)
            ways = []
            for _ in range(PINGS):
                begun = time.perf_counter()
                line.sendall(b"p")
                if line.recv(1) != b"p":
                    raise OSError("it was not answered")
                ways.append((time.perf_counter() - begun) / 2)
            line.sendall(b"s")
            _sent(line, seconds)
        return {"ms": 1e3 * statistics.median(ways)}


def _welcome(line: socket.socket, token: bytes) -> bool:
    """Return whether a guest proves to know the token, after which we prove it as well.

    It has a second, and nothing else of what it sends is read."""
    until, own = time.monotonic() + 1, os.urandom(NONCE)
    line.settimeout(1)
    line.sendall(own)
    theirs = _exactly(line, NONCE, until)
    right = hmac.compare_digest(_exactly(line, PROOF, until), _proof(token, b"guest", own, theirs))
    if right:
        line.sendall(_proof(token, b"host", own, theirs))
    return right


def _enter(line: socket.socket, token: bytes, seconds: float) -> None:
    """Prove to know the token to a host that proves it, too; raise OSError if it does not."""
    until, own = time.monotonic() + seconds, os.urandom(NONCE)
    theirs = _exactly(line, NONCE, until)
    line.sendall(own + _proof(token, b"guest", theirs, own))
    if not hmac.compare_digest(_exactly(line, PROOF, until), _proof(token, b"host", theirs, own)):
        raise OSError("another program answers there")


def _proof(token: bytes, who: bytes, host: bytes, guest: bytes) -> bytes:
    """Return the HMAC of both nonces, which have one length, under the name of who proves."""
    return hmac.digest(token, who + b":" + host + guest, "sha256")


def _exactly(line: socket.socket, count: int, until: float) -> bytes:
    """Return so many bytes, or fewer if no more come; raise TimeoutError if they come late."""
    got = b""
    while len(got) < count:
        line.settimeout(max(0.001, until - time.monotonic()))
        piece = line.recv(count - len(got))
        if not piece:
            break
        got += piece
    return got


def _sent(line: socket.socket, seconds: float) -> None:
    block, until = os.urandom(BLOCK), time.monotonic() + seconds
    left = MOST
    with contextlib.suppress(socket.timeout, ConnectionError):  # the other end has enough
        while left > 0 and time.monotonic() < until:
            left -= line.send(block)


def _counted(line: socket.socket, until: float) -> dict:
    """Return the bytes that came, and the bytes and seconds of their steady part."""
    room, total, came = bytearray(BLOCK), 0, [(time.monotonic(), 0)]
    with contextlib.suppress(socket.timeout, ConnectionError):
        while came[-1][0] < until and total < 2 * MOST:
            count = line.recv_into(room)
            if not count:
                break
            total += count
            came.append((time.monotonic(), total))
    size, seconds = _steady(came[1:] or came)
    return {"bytes": total, "steady": size, "seconds": seconds}


def _steady(came: list) -> tuple:
    """Return the bytes and seconds of a stream's steady part, of [time, bytes until then].

    What comes last may have been lost once and sent again, after a long pause."""
    begun, total = came[0][0] + BEGUN, came[-1][1]
    part = [each for each in came if each[0] >= begun and each[1] <= LASTED * total]
    first, last = (part[0], part[-1]) if len(part) > 1 else (came[0], came[-1])
    return last[1] - first[1], last[0] - first[0]


def talk(ask, tell) -> None:
    """Answer the requests, a line each, until they end.

    What goes wrong is an answer, too: {"error": in words}."""
    agent = Agent()
    for line in ask:
        request = json.loads(line)
        try:
            answer = getattr(agent, request.pop("do"))(**request)
        except TimeoutError:
            answer = {"error": "timed out"}
        except Exception as error:
            answer = {"error": getattr(error, "strerror", None) or str(error) or repr(error)}
        tell.write(MARK + json.dumps(answer) + "\n")
        tell.flush()


if __name__ == "__main__":
    talk(sys.stdin, sys.stdout)
