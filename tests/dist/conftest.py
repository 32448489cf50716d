"""Commands of ours as processes: start one, watch its ranks, end it, and see that nothing of it is left.

Every process that a command starts carries a mark in its environment, so it is found whoever its parent is.
"""

import os
import shutil
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 120.0
"""seconds: a guard against hanging, no measure of anything"""
ENTRY = ("launch/run.py",)
PATIENT = {"FLOWSPEC_HEARTBEAT": "0.5,30"}
"""a box so busy that a rank is silent for seconds while it loads is no failure here"""


class Command:
    """`python *start *words` at the root of the checkout, its output in files. As a context it leaves no process behind."""

    def __init__(self, folder: Path, *words: object, start: tuple[str, ...] = ENTRY, env: dict[str, str] | None = None):
        name = uuid.uuid4().hex
        self._mark = f"FLOWSPEC_TEST={name}".encode()
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FLOWSPEC_REPORT")}
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *start, *map(str, words)],
                cwd=ROOT,
                env={**clean, **PATIENT, **(env or {}), "FLOWSPEC_TEST": name},
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
            )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait()
        self.process.stdin.close()

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def alive(self) -> dict[int, str | None]:
        """Process id -> rank (None: not a rank) of all that this command started and that has not ended."""
        found: dict[int, str | None] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # it ended meanwhile, or is not ours to read
                    facts = (entry / "environ").read_bytes().split(b"\0")
                    if self._mark in facts:
                        found[int(entry.name)] = next((f[5:].decode() for f in facts if f.startswith(b"RANK=")), None)
        return found

    def signal(self, rank: int, number: int) -> None:
        pids = [pid for pid, name in self.alive().items() if name == str(rank)]
        os.kill(max(pids), number)  # a rank of a server has a guard, which started it

    def say(self, line: str) -> None:
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def wait_until(self, condition) -> None:
        """Until `condition()` holds; fails when the command has ended first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            ended = self.process.poll() is not None
            assert not ended and time.monotonic() < deadline, f"{'ended' if ended else 'no progress'}:\n{self.out}\n{self.err}"
            time.sleep(0.05)

    def wait_until_gone(self) -> None:
        """Until nothing of it is left, after its launcher was killed."""
        deadline = time.monotonic() + PATIENCE
        while left := self.alive():
            assert time.monotonic() < deadline, f"left: {left}\n{self.err}"
            time.sleep(0.05)

    def wait_until_loaded(self, stages: int) -> None:
        self.wait_until(lambda: all(f"rank {rank} of {stages}: layers " in self.err for rank in range(1, stages + 1)))

    def end(self) -> int:
        """Wait for the exit code; nothing that was started may be left."""
        self.process.stdin.close()
        code = self.process.wait(PATIENCE)
        assert self.alive() == {}
        return code


@pytest.fixture
def command(tmp_path):
    """`command(*words, ...)` starts a Command whose files lie in the test's folder."""
    with ExitStack() as stack:
        yield lambda *words, **more: stack.enter_context(Command(tmp_path, *words, **more))


@pytest.fixture
def damaged(pair, tmp_path):
    """A copy of the pair's configuration, its split and its draft: (config, split, draft), free to be damaged."""
    split, draft, config = (tmp_path / name for name in ("split", "draft", "config.yaml"))
    shutil.copytree(pair.split(2), split)
    shutil.copytree(pair.draft, draft)
    config.write_text("stages: split\ndrafter: {kind: lm, path: draft}\n")
    return config, split, draft
