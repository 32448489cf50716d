"""Who may come to a ring of processes: at one address, only while ranks connect, and with the run's secret."""

import json
import os
import random
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from tests.runtime.test_trust import knock

pytestmark = pytest.mark.slow
PROMPT = "for i in"
LISTENS, MOST = "0A", 60e6


def listeners(pids) -> dict[tuple[str, int], int]:
    """(Address, port) -> process id of all TCP sockets at which these processes listen, as /proc tells it."""
    found = {}
    for pid in pids:
        own = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
        for table, size in (("tcp", 4), ("tcp6", 16)):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                where, state, inode = (line.split()[k] for k in (1, 3, 9))
                if state == LISTENS and f"socket:[{inode}]" in own:
                    address, port = where.split(":")
                    words = [bytes.fromhex(address[k : k + 8])[::-1] for k in range(0, 2 * size, 8)]
                    family = socket.AF_INET if size == 4 else socket.AF_INET6
                    found[socket.inet_ntop(family, b"".join(words)), int(port, 16)] = pid
    return found


def memory(pids) -> int:
    """The bytes that these processes hold."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") for pid in pids)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="/proc tells who listens")
def test_garbage_at_every_port_of_a_ring_changes_neither_its_text_nor_its_memory(pair, command, tmp_path):
    """200 connections that say nothing, nonsense, half of it, or too much; and no port is open to other machines."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    files = [tmp_path / name for name in ("alone.jsonl", "disturbed.jsonl")]
    words = (pair.config(2), "--prompt", PROMPT, "--max-new-tokens", 80)
    assert command(*words, "--json", files[0]).end() == 0
    run = command(*words, "--json", files[1], "emulate.stage_ms=60")
    run.wait_until(lambda: len(run.out) > len(PROMPT))
    pids = [*run.alive()]
    ports = listeners(pids)
    ranks = {pid for pid, rank in run.alive().items() if rank}
    assert {address for address, _ in ports} == {"127.0.0.1"}
    assert len(ports) >= 1 + 3 * 3, "torchrun's store, and each rank's doors of three groups"
    before, rng, inside = memory(pids), random.Random(seed), []
    for address, pid in ports.items():
        if pid in ranks:
            with pytest.raises(TimeoutError):
                knock(address, rng, 1, seconds=0.1)
        else:
            inside += knock(address, rng, 200)
    assert len(inside) > 100
    with suppress(OSError):
        assert memory(pids) - before < MOST
    assert run.end() == 0, run.err
    texts = [json.loads(file.read_text())["token_ids"] for file in files]
    assert texts[0] == texts[1]
    for guest in inside:
        guest.close()


def test_a_rank_without_the_run_s_secret_is_refused_by_name_on_every_rank(pair, command, tmp_path):
    """Before that, the store's door hears garbage while it waits for the last rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words, secret = tmp_path / "words", "only for the ranks of this run"
    run = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FLOWSPEC_REPORT": str(words)}
    secrets = [secret, secret, ""]

    def start(rank):
        env = {**run, "RANK": str(rank), "FLOWSPEC_SECRET": secrets[rank]}
        return command("run", pair.config(2, drafter="ngram"), "--prompt", "for", start=("-m", "flowspec"), env=env)

    ranks = [start(0), start(1)]
    ranks[0].wait_until(lambda: ("127.0.0.1", port) in listeners(ranks[0].alive()))
    assert {address for address, _ in listeners(ranks[0].alive())} == {"127.0.0.1"}
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    inside = knock(("127.0.0.1", port), random.Random(seed), 200)
    ranks.append(start(2))
    assert [rank.end() for rank in ranks] == [2, 2, 2], [rank.err for rank in ranks]
    said = [json.loads(line) for line in words.read_text().splitlines()]
    line = (
        f"rank 2 (stage 2, {socket.gethostname()}) does not know this run's secret: it has none; "
        "give it rank 0's (FLOWSPEC_SECRET, FLOWSPEC_SECRET_FILE)"
    )
    assert said == [{"line": line, "code": 2}] * 3
    assert secret not in "".join(rank.out + rank.err for rank in ranks)
    for guest in inside:
        guest.close()
