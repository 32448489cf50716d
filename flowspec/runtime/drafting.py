"""The drafter runs in its own thread, so that drafting and verification never wait for each
other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowspec.comm.base import Clock, Inbox
from flowspec.core.cost import RowCost
from flowspec.core.messages import Answered, Commit, Draft, DraftNode, Read
from flowspec.core.request import Request
from flowspec.draft.base import Drafter, Noise, Session
from flowspec.runtime.tracing import SpanLog

Job = Callable[[], None]


class Local(NamedTuple):
    """Local is an event of rank 0's own drafter in rank 0's inbox."""

    event: Read | Answered


class Joined:
    """Joined puts the features of several layers side by side.

    Each layer's features come from the stage that holds it, in the order of the text."""

    def __init__(self, layers: Sequence[int]):
        # layer -> its rows at positions for which another layer's rows are still missing
        self._waiting: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._given = 0

    def add(self, layers: Sequence[int], at: int, rows: Tensor) -> Tensor | None:
        """Take in rows [n, len(layers) * hidden] at the text's positions from `at` on.

        Return the rows that are now complete, [m, all layers * hidden]; None if there are none."""
        for layer, part in zip(layers, rows.cpu().chunk(len(layers), -1), strict=True):
            assert at == self._given + len(self._waiting[layer]), "features out of the text's order"
            self._waiting[layer] += part
        complete = min(map(len, self._waiting.values()))
        if not complete:
            return None
        whole = torch.cat([torch.stack(rows[:complete]) for rows in self._waiting.values()], -1)
        self._given += complete
        self._waiting = {layer: rows[complete:] for layer, rows in self._waiting.items()}
        return whole


class _Reading:
    """A request in the draft thread."""

    def __init__(self, layers: Sequence[int], awaited: int, log: SpanLog):
        self.log = log
        self.prompt: list[Tensor] = []
        self.awaited = awaited
        """So many rows of the prompt's features are still to come."""
        self.joined = Joined(layers)
        self.held: list[Job] = []
        """These jobs wait for the prompt's features."""
        self.session: Session | None = None
        """It is there once the drafter has read the prompt."""


class DraftThread:
    """The draft thread does its jobs in order and puts the drafter's answers into the inbox.

    Reading a prompt and each drafter forward take at least `least` seconds (emulation). An
    exception in the thread is raised where the inbox is read."""

    def __init__(self, drafter: Drafter, inbox: Inbox, least: float = 0.0):
        self._drafter, self._inbox, self._least = drafter, inbox, least
        self._clock = inbox.clock
        self.features = drafter.features
        """The drafter reads the target's last hidden rows. Those of the prompt come by `learn`, the
        others with each commit."""
        self.layers = drafter.layers
        """The drafter reads the inputs of these target layers; all come by `layer_features`."""
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._requests: dict[int, _Reading] = {}
        self.forget()
        self.read = 0.0
        """The drafter read the last prompt in this many seconds per token."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="draft", daemon=True)
        self._thread.start()

    def forget(self) -> None:
        """Forget the measured costs of the drafter."""
        self.cost = RowCost()
        """This is the measured cost of the drafter's forwards over nodes."""

    def begin(self, request: Request, noise: Noise | None, log: SpanLog) -> None:
        """Read the prompt, at once or when its features have arrived; `Read` comes when it is done.

        Commits wait for it. `noise` couples the drafter to the target's sampling noise; None means
        that it is not coupled."""
        awaited = request.prompt_length - 1 if self.features or self.layers else 0
        reading = self._requests[request.id] = _Reading(self.layers, awaited, log)
        self._do(reading, lambda: self._begin(reading, request, noise))

    def end(self, request: int) -> None:
        """Forget a request, which need not be there."""
        reading = self._requests.pop(request, None)
        if reading:
            self._queue.put(lambda: reading.session.end() if reading.session else None)

    def layer_features(self, request: int, layers: Sequence[int], at: int, rows: Tensor) -> None:
        """Take in the inputs of these layers, [n, len(layers) * hidden].

        They belong to the text's tokens from position `at` on."""
        whole = self._requests[request].joined.add(layers, at, rows)
        if whole is not None:
            self.learn(request, whole)

    def learn(self, request: int, features: Tensor) -> None:
        """Take in the features [n, width] of the next tokens of the text; the prompt's come
        first."""
        reading = self._requests[request]
        prompt, rest = features[: reading.awaited], features[reading.awaited :]
        if reading.awaited:
            reading.prompt.append(prompt)
            reading.awaited -= len(prompt)
            for job in reading.held if not reading.awaited else ():
                self._queue.put(job)
        if len(rest):
            self._do(reading, lambda: _session(reading).learn(rest))

    def draft(self, draft: Draft) -> None:
        """Run a drafter forward; `Answered` comes to the inbox. All its requests have been read."""
        cost = self.cost  # it may be forgotten by the time this is done
        asks = [(request, self._requests[request], nodes) for request, nodes in draft.asks]
        self._queue.put(lambda: self._propose(asks, cost, draft.lap))

    def commit(self, request: int, commit: Commit, features: Tensor | None) -> None:
        """Tell the drafter of a commit, with the target's features [len(commit.path), hidden].

        `features` is None if the drafter does not read them, or if they come by
        `layer_features`."""
        reading = self._requests[request]
        self._do(reading, lambda: _session(reading).commit(commit, features))

    def close(self) -> None:
        """Finish the present job, drop the others and end the thread."""
        self._closing = True
        self._queue.put(None)
        self._thread.join()

    def _do(self, reading: _Reading, job: Job) -> None:
        if reading.awaited:
            reading.held.append(job)
        else:
            self._queue.put(job)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None and not self._closing:
            try:
                job()
            except BaseException as error:
                self._inbox.fail(error)
                return

    def _begin(self, reading: _Reading, request: Request, noise: Noise | None) -> None:
        features = torch.cat(reading.prompt) if reading.prompt else None
        reading.session, seconds = self._at_least(
            [reading.log], lambda: self._drafter.begin(request, noise, features)
        )
        self.read = seconds / request.prompt_length
        self._inbox.put(Local(Read(request.id)))

    def _propose(
        self, asks: list[tuple[int, _Reading, tuple[DraftNode, ...]]], cost: RowCost, lap: float
    ) -> None:
        self._drafter.lap = lap
        sessions = [(_session(reading), nodes) for _, reading, nodes in asks]
        drafted, seconds = self._at_least(
            [reading.log for _, reading, _ in asks], lambda: self._drafter.propose(sessions)
        )
        cost.observe(sum(len(nodes) for _, _, nodes in asks), seconds)
        requests = [request for request, _, _ in asks]
        self._inbox.put(Local(Answered(tuple(zip(requests, drafted, strict=True)))))

    def _at_least(self, logs: Sequence[SpanLog], work: Callable):
        """Return the result of `work()` and its seconds, stretched to the emulated least."""
        result, begun, ended = at_least(self._clock, self._least, work)
        for log in logs:
            log.add(0, "draft", "draft", begun, ended)
        return result, ended - begun


def at_least(clock: Clock, least: float, work: Callable) -> tuple[Any, float, float]:
    """Return the result of `work()`, stretched to so many seconds, and when it began and ended."""
    begun = clock.now()
    result = work()
    clock.sleep(begun + least - clock.now())
    return result, begun, clock.now()


def _session(reading: _Reading) -> Session:
    assert reading.session is not None, "the drafter has not read the prompt"
    return reading.session
