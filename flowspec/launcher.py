"""The launcher starts a run on one host by one command.

It checks everything in this process, starts the ranks with torchrun, and says in one line how the
run ended. On several hosts, start `torchrun ... launch/run.py CONFIG ...` on each; the ranks then
speak for themselves."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flowspec.comm.doors import listening
from flowspec.core.topology import Topology
from flowspec.files import ROOT
from flowspec.journal import JOURNAL
from flowspec.output import WITHOUT
from flowspec.secret import FILE, SECRET, secret_for_run

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

QUIET = 128 + signal.SIGPIPE
"""This is the exit code if whoever read standard output had enough, as of a tool that the signal
ends."""


def launch(argv: Sequence[str], topology: Topology, restart: int = 0) -> int:
    """Run `python -m flowspec *argv` as all ranks, on this host; return the exit code.

    If a rank is lost they all are started again, at most `restart` times, and go on with what was
    committed (journal.py)."""
    with tempfile.TemporaryDirectory(prefix="flowspec-") as folder:
        last_words = Path(folder) / "report"
        os.environ.update(_environment(last_words))
        os.environ.pop(FILE, None)  # what stood in it is SECRET now
        if restart:
            os.environ[JOURNAL] = str(Path(folder) / "journal")
        for left in range(restart, -1, -1):
            end = _once(argv, topology, last_words)
            if end.code != LOST or not left:
                return end.code if end.line is None else say(end.line, end.code)
            say(f"{end.line}; started again ({restart - left + 1} of {restart})", end.code)
            last_words.unlink(missing_ok=True)
        raise AssertionError("the last start has no other behind it")


LOST = 1
"""This is the exit code if a rank was lost, or failed."""


class End(NamedTuple):
    """How all ranks ended."""

    code: int
    line: str | None
    """This is to be said of it."""


def _once(argv: Sequence[str], topology: Topology, last_words: Path) -> End:
    try:
        _torchrun(argv, topology.world_size)
        return End(0, None)
    except KeyboardInterrupt:
        return End(130, "interrupted")
    except Exception as error:
        return _obituary(error, last_words, topology)


def _environment(last_words: Path) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "FLOWSPEC_REPORT": str(last_words),
        SECRET: secret_for_run(),
        # as torchrun would do, but without its warning; the engine sets each rank's threads
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def _torchrun(argv: Sequence[str], world_size: int) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry as registry

    logging.disable(
        logging.CRITICAL
    )  # this process logs nothing: torchrun's report has 66 lines, ours has one
    registry.register(_MEETING, _meeting)
    door = listening(HERE, int(os.environ.get("MASTER_PORT") or 0))
    where = ["--rdzv-backend", _MEETING, "--rdzv-endpoint", f"{HERE}:{door.getsockname()[1]}"]
    where += ["--rdzv-conf", f"door={door.detach()}"]
    run.run(run.parse_args(["--nproc-per-node", str(world_size), *where, "-m", "flowspec", *argv]))


HERE = "127.0.0.1"
_MEETING = "flowspec"
_PATIENCE = 600
"""torchrun's own store has so many seconds for each question, too."""


def _meeting(parameters: RendezvousParameters) -> RendezvousHandler:
    """Return where torchrun's ranks meet: a store that listens at the door, a socket of HERE.

    The store that torchrun would make listens at all addresses of the machine."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    port, door = int(parameters.endpoint.partition(":")[2]), int(parameters.config["door"])

    class Meeting(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return _MEETING

    meeting = Meeting(HERE, port, 0, 1, parameters.run_id, _PATIENCE)
    meeting._store = TCPStore(HERE, port, 1, True, meeting.timeout, master_listen_fd=door)
    return meeting


def _obituary(error: Exception, last_words: Path, topology: Topology) -> End:
    """Return what the ranks said, or else what torchrun knows of the first that fell."""
    if hasattr(error, "sigval"):  # torchrun's SignalException: we were told to go
        return End(130, "interrupted")
    with suppress(OSError, ValueError, IndexError):  # nobody said anything, or the disk was full
        said = json.loads(last_words.read_text().splitlines()[0])
        return End(said["code"], said["line"])
    failures = getattr(error, "failures", None)  # ChildFailedError
    if failures is None:
        return End(1, f"the ranks could not be started: {error}")
    if any(failure.exitcode == QUIET for failure in failures.values()):
        return End(QUIET, None)
    rank, failure = min(
        failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].timestamp)
    )
    how = ended(failure.exitcode)
    return End(LOST, f"{topology.name(rank, socket.gethostname())} died: {how}")


def ended(code: int) -> str:
    """Return how a process ended that has this exit code."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def say(line: str, code: int) -> int:
    """Print a run's last line, and return its exit code."""
    print(f"{'' if code == 2 else os.linesep}flowspec: {line}", file=sys.stderr, flush=True)
    return code


def is_rank() -> bool:
    """Return whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


# ---- a rank of a target server -------------------------------------------------------------------
_GUARDED = "FLOWSPEC_GUARDED"


def guard() -> int | None:
    """Run this rank as a child, and return its exit code; None in the child itself.

    torchrun ends all ranks when one fails. A run over several servers (DSI) can do without one, so
    what kills such a rank is no failure: the exit code is 0 then, and rank 0 notices and says
    so."""
    if os.environ.get(_GUARDED):
        return None
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]], env={**os.environ, _GUARDED: "1"}
    )
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = child.wait()
    return 0 if code < 0 or code == WITHOUT else code
