"""Servers over engines of this process, each on a free port, and OpenAI's own client."""

import time
from contextlib import contextmanager

import pytest

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(
        package, reason=f"{package} is not installed (requirements_serve.txt, _dev)"
    )

import httpx
import openai

from flowspec import Engine, RankLost
from flowspec.files import ROOT
from flowspec.http.server import Server
from flowspec.http.settings import Settings
from flowspec.models.split import split

PATIENCE = 30.0
"""seconds: a guard against hanging, no measure of anything"""


class Served:
    """An engine behind a server: `client` is OpenAI's, `http` a plain one."""

    def __init__(self, engine: Engine, **settings):
        self.engine = engine
        self.server = Server(Settings(name="tiny", port=0, **settings))
        self.calls, self.url = self.server.calls, self.server.url
        key = settings.get("key") or "none"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)
        self.server.attach(engine)
        wait_until(lambda: self.calls.engine is not None)

    def close(self):
        self.client.close()
        self.http.close()
        self.server.stop("the test is over")

    def idle(self) -> bool:
        """Whether nothing is left of any request: no row, no text, no place."""
        load = self.engine.load
        return (load.running, load.waiting, load.rows, self.calls.taken, len(self.calls.open)) == (
            0,
        ) * 5

    def counted(self, name: str, value: str = "") -> int:
        return sum(
            n for key, n in self.calls.metrics.counts.items() if key[0] == name and key[2] == value
        )


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)


@contextmanager
def serving(engine: Engine, **settings):
    served = Served(engine, **settings)
    try:
        yield served
    finally:
        served.close()


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A configuration of the shipped models, whose texts are text, that drafts all the time."""
    folder = tmp_path_factory.mktemp("demo")
    split(str(ROOT / "demo" / "target"), 2, folder / "split")
    path = folder / "tiny.yaml"
    draft = ROOT / "demo" / "draft"
    path.write_text(
        f"stages: split\nmethod: serial\ntree: {{budget: 16}}\ndrafter: {{kind: lm, path: {draft}}}\nthreads: 1\nsampling: {{max_new_tokens: 6}}\n"
    )
    return path


@pytest.fixture(scope="session")
def served(demo):
    with Engine.from_config(demo) as engine, serving(engine) as served:
        yield served


@pytest.fixture(scope="module")
def slow(pair):
    """One on which 150 tokens take seconds; two texts may be asked for at a time."""
    with Engine.from_config(pair.config(1), ["method=ar", "emulate.stage_ms=40"]) as engine:
        with serving(engine, most_texts=2) as served:
            yield served


@pytest.fixture
def fragile(pair):
    """One whose ring can be broken: `break_it()` loses rank 1."""
    engine = Engine.from_config(pair.config(1), ["method=ar", "emulate.stage_ms=40"])
    with serving(engine) as served:
        served.break_it = lambda: engine._transport.inbox.fail(
            RankLost("rank 1 (stage 1) died: a test")
        )
        yield served
