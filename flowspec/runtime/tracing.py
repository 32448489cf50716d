"""A log is what a rank notes of a request while `trace` is on.

Rank 0 puts the notes of all ranks on one clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowspec.comm.base import Message
from flowspec.comm.shaped import wire_bytes
from flowspec.core.messages import Segment
from flowspec.trace import Fates, Span, untangled


class SpanLog:
    """A log holds the spans of one rank for one request, by that rank's clock.

    If it is off, nothing is kept."""

    def __init__(self, on: bool, request: int, hidden_scale: float = 1.0):
        self.on, self.spans = on, list[Span]()
        self._request, self._hidden_scale = request, hidden_scale

    def add(self, rank: int, row: str, name: str, begin: float, end: float, **facts) -> None:
        if self.on:
            self.spans.append(
                Span(rank, row, name, begin, end, {"request": self._request, **facts})
            )

    def arrived(
        self,
        message: Message,
        sender: int,
        rank: int,
        at: float,
        taken: float,
        segment: Segment | None,
    ) -> None:
        """Note a message of the ring: its way here, and its wait.

        The way lasts from when the sender let go of it (by the sender's clock) to `at`; the wait
        lasts until `taken`. The segment is None for a chunk of the prompt."""
        if self.on:
            about = {"segment": segment.number, "ids": segment.ids} if segment else {}
            size = wire_bytes(message, self._hidden_scale)
            self.add(sender, "send", "prefill", message.meta["sent"], at, bytes=size, **about)
            self.add(rank, "receive", "prefill", at, taken, **about)


def merged(
    notes: Mapping[int, Sequence[Span]], offsets: Mapping[int, float], fates: Fates
) -> list[Span]:
    """Return the spans of all ranks as one list on rank 0's clock, with each segment's verdict.

    `notes` maps a rank to its spans and `offsets` a rank to its clock minus rank 0's. A span begins
    by the clock of the rank it belongs to and ends by the clock of the rank that noted it."""
    spans = []
    for rank, noted in notes.items():
        for span in noted:
            begin, end = span.begin - offsets[span.rank], span.end - offsets[rank]
            spans.append(fates.judge(span._replace(begin=begin, end=max(begin, end))))
    return untangled(spans)
