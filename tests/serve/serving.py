"""A server over an engine of this process, on a free port, and its clients."""

import time
from contextlib import contextmanager

import pytest

from flowspec import Engine
from flowspec.http.settings import Settings

for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed (requirements_serve.txt)")
openai = pytest.importorskip("openai", reason="openai is not installed (requirements_dev.txt)")
httpx2 = pytest.importorskip("httpx2")

PATIENCE = 30.0
"""seconds: a guard against hanging, no measure of anything"""


class Served:
    """An engine behind a server: `client` is OpenAI's, `http` a plain one."""

    def __init__(self, engine: Engine, **settings):
        self.engine = engine
        from flowspec.http.server import Server

        self.server = Server(Settings(name="tiny", port=0, **settings))
        self.calls, self.url = self.server.calls, self.server.url
        key = settings.get("key") or "none"
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE
        )
        self.http = httpx2.Client(base_url=self.url, timeout=PATIENCE)
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
