"""The drafter runs in its own thread, so that drafting and verification never wait for each other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowspec.comm.base import Inbox
from flowspec.core.cost import RowCost
from flowspec.core.messages import Commit, Draft, Drafted
from flowspec.core.request import Request
from flowspec.draft.base import Drafter, Noise
from flowspec.runtime.tracing import Log

Job = Callable[[], None]


class Local(NamedTuple):
    """Local is an event of rank 0's own drafter, with the id of the request it belongs to."""

    request: int
    event: Drafted


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
        self._held: list[Job] = []  # jobs that wait for the prompt's features
        self._awaited = 0  # rows of the prompt's features that are still to come
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

    def begin(self, request: Request, noise: Noise | None, log: Log) -> None:
        """Read the prompt, at once or when its features have arrived.

        Later jobs wait for it. `noise` couples the drafter to the target's sampling noise; None
        means that it is not coupled."""
        self._log = log
        self._held, self.read = [], 0.0
        self._prompt = prompt = list[Tensor]()
        self._joined = Joined(self.layers)
        self._awaited = request.prompt_length - 1 if self.features or self.layers else 0
        self._do(lambda: self._begin(request, noise, torch.cat(prompt) if prompt else None, log))

    def layer_features(self, layers: Sequence[int], at: int, rows: Tensor) -> None:
        """Take in the inputs of these layers, [n, len(layers) * hidden].

        They belong to the text's tokens from position `at` on."""
        whole = self._joined.add(layers, at, rows)
        if whole is not None:
            self.learn(whole)

    def learn(self, features: Tensor) -> None:
        """Take in the features [n, width] of the next tokens of the text; the prompt's come first."""
        prompt, rest = features[: self._awaited], features[self._awaited :]
        if self._awaited:
            self._prompt.append(prompt)
            self._awaited -= len(prompt)
            for job in self._held if not self._awaited else ():
                self._queue.put(job)
        if len(rest):
            self._do(lambda: self._drafter.learn(rest))

    def draft(self, request: Request, draft: Draft) -> None:
        """Run a drafter forward; its `Drafted` comes to the inbox as a Local."""
        log, cost = self._log, self.cost  # the next request may have begun by the time this is done
        self._do(lambda: self._propose(request, draft, log, cost))

    def commit(self, commit: Commit, features: Tensor | None) -> None:
        """Tell the drafter of a commit, with the target's features [len(commit.path), hidden].

        `features` is None if the drafter does not read them, or if they come by `layer_features`."""
        self._do(lambda: self._drafter.commit(commit, features))

    def close(self) -> None:
        """Finish the present job, drop the others and end the thread."""
        self._closing = True
        self._queue.put(None)
        self._thread.join()

    def _do(self, job: Job) -> None:
        if self._awaited:
            self._held.append(job)
        else:
            self._queue.put(job)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None and not self._closing:
            try:
                job()
            except BaseException as error:
                self._inbox.fail(error)
                return

    def _begin(
        self, request: Request, noise: Noise | None, features: Tensor | None, log: Log
    ) -> None:
        _, seconds = self._at_least(log, lambda: self._drafter.begin(request, noise, features))
        self.read = seconds / request.prompt_length

    def _propose(self, request: Request, draft: Draft, log: Log, cost: RowCost) -> None:
        drafted, seconds = self._at_least(log, lambda: self._drafter.propose(draft.nodes))
        cost.observe(len(draft.nodes), seconds)
        self._inbox.put(Local(request.id, drafted))

    def _at_least(self, log: Log, work: Callable):
        """Return the result of `work()` and its seconds, stretched to the emulated least."""
        begun = self._clock.now()
        result = work()
        self._clock.sleep(begun + self._least - self._clock.now())
        ended = self._clock.now()
        log.add(0, "draft", "draft", begun, ended)
        return result, ended - begun
