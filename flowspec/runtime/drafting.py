"""The drafter in a thread of its own, so that drafting and verification never wait for each other."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from flowspec.comm.base import Inbox
from flowspec.core.messages import Commit, Draft, Drafted
from flowspec.core.request import Request
from flowspec.draft.base import Drafter, Noise
from flowspec.runtime.tracing import Log


class Local(NamedTuple):
    """An event made on rank 0 itself, for the request it belongs to."""

    request: int
    event: Drafted


class DraftThread:
    """Does what it is told in order; answers land in the inbox. A forward takes at least `least` seconds."""

    def __init__(self, drafter: Drafter, inbox: Inbox, least: float = 0.0):
        self._drafter, self._inbox, self._least = drafter, inbox, least
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="draft", daemon=True)
        self._thread.start()

    def begin(self, request: Request, noise: Noise | None, log: Log) -> None:
        self._log = log
        self._queue.put(lambda: self._at_least(lambda: self._drafter.begin(request, noise)))

    def draft(self, request: Request, draft: Draft) -> None:
        self._queue.put(lambda: self._propose(request, draft))

    def commit(self, commit: Commit) -> None:
        self._queue.put(lambda: self._drafter.commit(commit))

    def close(self) -> None:
        """Finish the job at hand, drop the others."""
        self._closing = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None and not self._closing:
            try:
                job()
            except BaseException as error:
                self._inbox.fail(error)
                return

    def _propose(self, request: Request, draft: Draft) -> None:
        self._inbox.put(Local(request.id, self._at_least(lambda: self._drafter.propose(draft.nodes))))

    def _at_least(self, work: Callable):
        begun = time.monotonic()
        result = work()
        time.sleep(max(0.0, begun + self._least - time.monotonic()))
        self._log.add(0, "draft", "draft", begun, time.monotonic())
        return result
