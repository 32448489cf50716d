"""A rival is another program that continues texts, in a process of its own, beside a ring.

It says its facts once it is loaded, then answers each line of its standard input (`Ask`) with one
of its standard output, all in JSON, and ends when nothing can be asked any more. While it has no
turn it waits blocked, as a ring does, so that neither computes in the other's time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flowspec.core.request import Sampling
from flowspec.errors import RankLost

Ask = Callable[[dict], dict]
"""{side, tokens, new_tokens, temperature, seed, ...} -> {token_ids, prefill_seconds,
decode_seconds, facts}: the first token comes after the former, the last so long after the first."""
PATIENCE = 20.0
"""A rival has so many seconds to end by itself."""
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
}


def asked(side: str, tokens: Sequence[int], sampling: Sampling, new_tokens: int) -> dict:
    """Return what a rival is asked for."""
    return {
        "side": side,
        "tokens": list(tokens),
        "new_tokens": new_tokens,
        "seed": sampling.seed or 0,
        **{key: getattr(sampling, key) for key in ("temperature", "top_k", "top_p", "min_p")},
    }


def serve(answer: Ask, facts: dict) -> None:
    """Be a rival: say `facts`, then answer until the input ends.

    What else is printed goes to standard error."""
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)
        print(json.dumps(facts), file=out)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=out)


class Rival:
    """A rival as its parent sees it, with the CPU time that it used in and out of its turns.

    `words` are Python's, `threads` the number that it computes with. Raise RankLost if it ends
    before it is asked to."""

    def __init__(self, name: str, words: Sequence[str], threads: int, **environment: str):
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the parent's
        )

    def __enter__(self) -> Rival:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(0 if failure else PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._process.stdout.close()

    def ready(self) -> dict:
        """Return its facts, once it can answer."""
        facts = self._hear()
        self._begun, self._before = time.monotonic(), cpu_seconds(self._process.pid)
        self._turns = self._used = 0.0
        return facts

    def ask(self, asked: dict) -> dict:
        """Return the answer, in whose facts `strangers_cores` says how many cores others used."""
        assert self._process.stdin
        begun, before, busy = time.monotonic(), cpu_seconds(self._process.pid), machine_seconds()
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        answer = self._hear()
        spent, used = time.monotonic() - begun, cpu_seconds(self._process.pid) - before
        self._turns, self._used = self._turns + spent, self._used + used
        answer["facts"]["strangers_cores"] = max(0.0, machine_seconds() - busy - used) / spent
        return answer

    def idle_cpu(self) -> float:
        """Return the share of a core that it used while it was not its turn."""
        waited = time.monotonic() - self._begun - self._turns
        return (cpu_seconds(self._process.pid) - self._before - self._used) / waited

    def _hear(self) -> dict:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RankLost(
                f"the process of {self._name} ended (exit code {self._process.wait()}): see above"
            )
        return json.loads(line)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children.

    It is 0 for what has ended, and where there is no /proc."""
    place = Path(f"/proc/{pid}")
    try:
        fields = (place / "stat").read_text().rpartition(")")[2].split()
        children = [
            int(child)
            for task in (place / "task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(map(cpu_seconds, children))


def machine_seconds() -> float:
    """Return the CPU time that all cores have spent on anything so far; 0 without /proc."""
    place = Path("/proc/stat")
    if not place.exists():
        return 0.0
    first = place.read_text().split("\n", 1)[0]
    user, nice, system, _, _, *interrupts = map(int, first.split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
