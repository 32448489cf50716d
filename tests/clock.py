"""Time that passes only when somebody sleeps or waits for it."""

import threading

from flowspec.comm.base import Clock

PATIENCE = 60.0
"""real seconds: a guard against hanging"""


class VirtualClock(Clock):
    """For one thread that waits; others may sleep. What takes no emulated time takes none at all."""

    def __init__(self):
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += max(0.0, seconds)

    def wait(self, ready: threading.Condition, seconds: float | None) -> None:
        if seconds is None:  # for another thread
            assert ready.wait(PATIENCE), "nothing came"
        else:
            self.time += seconds
