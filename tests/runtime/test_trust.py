"""Who may be a rank: the secret, what is proved with it, and the sockets that listen."""

import itertools
import json
import os
import random
import socket
import struct
import sys
import threading
from contextlib import suppress
from datetime import timedelta

import pytest
import torch.distributed as dist

from flowspec import launcher
from flowspec.comm import doors
from flowspec.comm.doors import hasten, listening, shut, sockets
from flowspec.comm.gloo import Stranger, prove
from flowspec.comm.seal import Sealed
from flowspec.core.topology import Topology
from flowspec.errors import UserError
from flowspec.runtime import agreement, trust
from flowspec.runtime.trust import introduce
from flowspec.secret import FILE, SECRET, own_secret, secret_for_run

PATIENCE = 60.0
RIGHT, OTHER = b"0123456789abcdef", b"fedcba9876543210"
linux = pytest.mark.skipif(sys.platform != "linux", reason="doors are shut on Linux alone")


# ---- the secret ------------------------------------------------------------------------------------
@pytest.fixture
def environment(monkeypatch):
    for name in (SECRET, FILE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_secret_is_a_variable_or_a_file_of_one_s_own(environment, tmp_path):
    assert own_secret() == b""
    made = secret_for_run()
    assert len(made) == 64 and made != secret_for_run()
    environment.setenv(SECRET, made)
    assert own_secret() == made.encode() and secret_for_run() == made
    file = tmp_path / "secret"
    file.write_text(made + "\n")
    file.chmod(0o600)
    environment.setenv(SECRET, "")
    environment.setenv(FILE, str(file))
    assert own_secret() == made.encode() and secret_for_run() == made


@pytest.mark.parametrize("text", ["short", " " * 40, "x" * 5000])
def test_what_is_no_secret_is_refused_without_showing_it(environment, tmp_path, text):
    environment.setenv(SECRET, text)
    with pytest.raises(UserError, match=r"FLOWSPEC_SECRET must have 16 to 4096 bytes") as said:
        own_secret()
    assert text not in str(said.value)
    file = tmp_path / "secret"
    file.write_text(text)
    file.chmod(0o600)
    environment.delenv(SECRET)
    environment.setenv(FILE, str(file))
    with pytest.raises(UserError, match=rf"FLOWSPEC_SECRET_FILE {file} must have 16"):
        own_secret()


def test_a_file_that_others_read_or_that_is_not_there_is_refused(environment, tmp_path):
    file = tmp_path / "secret"
    environment.setenv(FILE, str(file))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        own_secret()
    file.write_bytes(RIGHT)
    for mode in (0o640, 0o604):
        file.chmod(mode)
        with pytest.raises(UserError, match="is open to other users: chmod 600 it"):
            own_secret()
    environment.setenv(SECRET, RIGHT.decode())
    with pytest.raises(UserError, match="are both set: give one of them"):
        own_secret()


def test_the_launcher_gives_its_ranks_a_secret_that_only_the_environment_holds(environment):
    given = launcher._environment(launcher.Path("report"))
    assert len(given[SECRET]) == 64
    assert SECRET not in os.environ


# ---- through the store -----------------------------------------------------------------------------
def introduced(*secrets: bytes) -> list:
    """What each rank hears: the run's key, or why it is refused."""
    store, topology = dist.HashStore(), Topology(len(secrets) - 1)
    heard: list = [None] * len(secrets)

    def join(rank):
        try:
            heard[rank] = introduce(
                store, topology, rank, secrets[rank], lambda r, host: f"rank {r}"
            )
        except UserError as error:
            heard[rank] = str(error)

    together(*(lambda rank=rank: join(rank) for rank in topology.ranks))
    return heard


def together(*works) -> None:
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_who_knows_the_secret_gets_the_key_of_this_run_and_of_no_other():
    for secret in (RIGHT, b""):
        keys = introduced(secret, secret, secret)
        assert len(set(keys)) == 1 and len(keys[0]) == 32
        assert introduced(secret, secret, secret)[0] != keys[0]


GIVE = "; give it rank 0's (FLOWSPEC_SECRET, FLOWSPEC_SECRET_FILE)"


@pytest.mark.parametrize(
    ("secrets", "line"),
    [
        ((RIGHT, RIGHT, b""), "rank 2 does not know this run's secret: it has none" + GIVE),
        ((RIGHT, OTHER, RIGHT), "rank 1 does not know this run's secret: it has another than rank 0" + GIVE),
        ((b"", b"", RIGHT), "rank 2 has a secret (FLOWSPEC_SECRET, FLOWSPEC_SECRET_FILE), rank 0 has none: give all ranks the same"),
    ],
)  # fmt: skip
def test_who_does_not_is_refused_by_name_on_every_rank(secrets, line):
    assert introduced(*secrets) == [line] * 3


def test_a_proof_of_another_rank_or_run_proves_nothing(monkeypatch):
    """The stranger without the secret writes what rank 1 wrote, now and in an earlier run."""
    monkeypatch.setattr(agreement, "READING", timedelta(seconds=0.1))
    store = dist.HashStore()
    inner = dist.PrefixStore("flowspec/trust", store)
    heard: list = []

    def rank(k):
        try:
            heard.append(introduce(store, Topology(2), k, RIGHT, lambda r, host: f"rank {r}"))
        except UserError as error:
            heard.append(str(error))

    def stranger():
        inner.set("hello/2", inner.get("hello/1"))
        inner.set("proof/2", inner.get("proof/1"))

    together(lambda: rank(0), lambda: rank(1), stranger)
    assert [line.partition(":")[0] for line in heard] == [
        "rank 2 does not know this run's secret"
    ] * 2


@pytest.mark.parametrize(
    "hello",
    [
        b"",
        b"[",
        b"[" * 5000,
        b'["a", "b", 1]',
        b'["\\u001b[31m", "h\\u001b", true]',
        b"x" * 100_000,
    ],
)
def test_a_hello_of_garbage_is_refused_in_one_line(monkeypatch, hello):
    monkeypatch.setattr(trust, "PATIENCE", timedelta(seconds=0.05))
    monkeypatch.setattr(agreement, "READING", timedelta(seconds=0.05))
    store = dist.HashStore()
    dist.PrefixStore("flowspec/trust", store).set("hello/1", hello)
    with pytest.raises(UserError, match=r"rank 1 \(.*\) does not know this run's secret") as said:
        introduce(store, Topology(1), 0, RIGHT, lambda r, host: f"rank {r} ({host})")
    assert str(said.value).isprintable() and len(str(said.value)) < 300


def test_what_is_not_sealed_with_the_run_s_key_under_this_name_reads_as_empty():
    store = dist.HashStore()
    mine, theirs = Sealed(store, RIGHT, "beats"), Sealed(store, OTHER, "beats")
    mine.set("a", "sé")
    assert mine.get("a") == "sé".encode()
    assert theirs.get("a") == b"" and Sealed(store, RIGHT, "other").multi_get([]) == []
    raw = dist.PrefixStore("flowspec/beats", store)
    raw.set("b", raw.get("a"))
    raw.set("c", b"")
    raw.set("d", raw.get("a")[:-1] + b"!")
    assert mine.multi_get(["a", "b", "c", "d"]) == ["sé".encode(), b"", b"", b""]


# ---- sockets ---------------------------------------------------------------------------------------
def test_a_door_is_at_one_address_alone():
    with listening("127.0.0.1", 0) as door:
        host, port = door.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(OSError):
            listening("127.0.0.1", port)
    with pytest.raises(OSError):
        listening("192.0.2.1", 0)  # an address for documentation (RFC 5737): nobody's


@linux
def test_a_shut_door_lets_nobody_in_and_who_is_in_stays():
    with listening("127.0.0.1", 0) as door, listening("127.0.0.1", 0) as other:
        assert {door.fileno(), other.fileno()} <= set(sockets().values())
        with socket.create_connection(door.getsockname(), PATIENCE) as guest:
            inside, _ = door.accept()
            with inside:
                shut({name: n for name, n in sockets().items() if n != other.fileno()})
                with pytest.raises(TimeoutError):
                    socket.create_connection(door.getsockname(), 0.2)
                socket.create_connection(other.getsockname(), PATIENCE).close()
                hasten(sockets())
                guest.sendall(b"here")
                assert inside.recv(4) == b"here"
                with suppress(OSError):  # an older kernel knows no such option
                    assert guest.getsockopt(socket.IPPROTO_TCP, doors._RTO_MAX_MS) == 1000


@pytest.fixture
def meshed(monkeypatch):
    """`meshed(keys, meanwhile)`: what two ranks of gloo's say of their proofs, each with its key.

    `meanwhile(addresses)` is called while the first has opened its doors and waits for the second."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")

    def mesh(keys, meanwhile=lambda addresses: None) -> list:
        store, before, said, groups = dist.HashStore(), sockets(), [None, None], []

        def rank(k):
            group = dist.ProcessGroupGloo(store, k, 2, timedelta(seconds=PATIENCE))
            groups.append(group)
            try:
                prove(group, [5, 7], keys[k], "ring")
                said[k] = "proved"
            except Stranger as stranger:
                said[k] = stranger.rank

        def second():
            while not (opened := listeners(before)):
                pass
            meanwhile(opened)
            rank(1)

        together(lambda: rank(0), second)
        return said

    return mesh


def listeners(before: dict[str, int]) -> list[tuple]:
    """The addresses at which this process listens, and did not before."""
    found = []
    for number in {n for name, n in sockets().items() if name not in before}:
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as same:
            if same.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.append(same.getsockname())
    return found


@linux
def test_links_prove_themselves(meshed):
    assert meshed([RIGHT, RIGHT]) == ["proved", "proved"]
    assert meshed([RIGHT, OTHER]) == [7, 5]


@linux
def test_garbage_at_gloo_s_door_while_it_is_open_is_no_matter(meshed):
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    guests: list = []

    def throw(addresses):
        for address in addresses:
            guests.extend(knock(address, random.Random(seed), 200))

    assert meshed([RIGHT, RIGHT], throw) == ["proved", "proved"]
    assert len(guests) >= 150
    for guest in guests:
        guest.close()


def knock(
    address: tuple, rng: random.Random, count: int, seconds: float = PATIENCE
) -> list[socket.socket]:
    """Connect so often, and say things that no rank would; what is still open afterwards.

    A gloo peer says a number of 8 bytes first; torch's store wants to hear 0 and 0x3C85F7CE."""
    hello = struct.pack("<BI", 0, 0x3C85F7CE)
    words = (
        lambda: rng.randbytes(rng.randrange(8, 400)),
        lambda: b"",
        lambda: None,
        lambda: b"\xff" * 64,
        lambda: struct.pack("<Q", 1 << 62),
        lambda: b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        lambda: hello[:3],
        lambda: hello,
        lambda: hello + struct.pack("<BQ", 1, 1 << 62),
        lambda: hello + struct.pack("<BQ4sQ", 1, 4, b"name", 1 << 62) + b"x" * 100,
        lambda: hello + rng.randbytes(200),
    )  # fmt: skip
    left = []
    for say in itertools.islice(itertools.cycle(words), count):
        guest = socket.create_connection(address, seconds)
        said = say()
        if said is None:
            guest.close()
            continue
        try:
            guest.sendall(said)
        except OSError:
            guest.close()
            continue
        left.append(guest)
    return left


@linux
def test_garbage_at_the_store_s_door_is_no_matter():
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    with listening("127.0.0.1", 0) as door:
        port, number = door.getsockname()[1], os.dup(door.fileno())
    wait = timedelta(seconds=PATIENCE)
    store = dist.TCPStore(
        "127.0.0.1", port, 2, True, wait, wait_for_workers=False, master_listen_fd=number
    )
    guests = knock(("127.0.0.1", port), random.Random(seed), 200)
    other = dist.TCPStore("127.0.0.1", port, 2, False, wait, wait_for_workers=False)
    other.set("a", json.dumps([1]))
    assert store.get("a") == b"[1]"
    for guest in guests:
        guest.close()
