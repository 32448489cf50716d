"""The server: the application in an event loop, in a thread of its own, beside an Engine.

It listens before there is an engine, and says so. The main thread waits for what ends it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import TYPE_CHECKING

import uvicorn

from flowspec.errors import RankLost, UserError
from flowspec.http.app import make_app
from flowspec.http.calls import Calls
from flowspec.http.guard import to_stderr
from flowspec.http.metrics import Metrics
from flowspec.http.settings import Settings

if TYPE_CHECKING:
    from flowspec.engine import Engine

FAREWELL = 2.0
"""Clients have so many seconds to hear that the run is over."""
CONNECTIONS = 1024
"""So many connections may be open at a time."""


class Server:
    """A server that listens once it is made; UserError if it cannot."""

    def __init__(self, settings: Settings):
        self.calls = Calls(settings.name, settings.most_texts, Metrics())
        self._socket = _listening(settings.host, settings.port)
        host, self.port = settings.host, self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        log = to_stderr if settings.log else None
        app = make_app(self.calls, settings.key, settings.most_bytes, settings.compat, log)
        self._loop = asyncio.new_event_loop()
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._uvicorn.serve([self._socket]))

    def attach(self, engine: Engine) -> None:
        """Take requests on: all ranks of this engine are loaded."""
        engine.before_the_end(self.stop)
        self._loop.call_soon_threadsafe(self.calls.attach, engine)

    def wait(self, engine: Engine) -> None:
        """Wait until the run breaks, and raise what broke it. An interruption ends it too."""
        try:
            while engine.error is None and not self.calls.broken and self._thread.is_alive():
                time.sleep(0.2)
        except KeyboardInterrupt:
            self.stop("the server is being stopped")
            raise
        why = str(engine.error or self.calls.why_not or "the HTTP server has ended by itself")
        self.stop(why)
        raise engine.error or RankLost(why)

    def stop(self, why: str) -> None:
        """Tell all clients why, and end; this may be called from any thread, and again."""
        deadline = time.monotonic() + FAREWELL
        self._loop.call_soon_threadsafe(self.calls.fail, why)
        while not (self.calls.broken and not self.calls.open) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._uvicorn.should_exit = True
        self._thread.join(max(0.0, deadline - time.monotonic()))


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen at --host {host} --port {port}: {why}") from None
