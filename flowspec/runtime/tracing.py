"""What a rank notes of a request while `trace` is on, and how rank 0 puts the notes of all ranks on one clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowspec.comm.base import Message
from flowspec.comm.shaped import wire_bytes
from flowspec.core.messages import Segment
from flowspec.trace import Fates, Span, untangled


class Log:
    """The spans of one rank for one request, by that rank's clock. Off: nothing is kept."""

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
        """A message of the ring: on its way from when the sender let go of it (by the sender's clock) to `at`, then waiting
        here until `taken`. None for the segment: a chunk of the prompt."""
        if self.on:
            about = {"segment": segment.number, "ids": segment.ids} if segment else {}
            size = wire_bytes(message, self._hidden_scale)
            self.add(sender, "send", "prefill", message.meta["sent"], at, bytes=size, **about)
            self.add(rank, "receive", "prefill", at, taken, **about)


def merged(
    notes: Mapping[int, Sequence[Span]], offsets: Mapping[int, float], fates: Fates
) -> list[Span]:
    """Rank -> its spans, as one list on rank 0's clock with each segment's verdict. `offsets`: rank -> its clock minus rank 0's.

    A span begins by the clock of the rank it belongs to and ends by the clock of the rank that noted it."""
    spans = []
    for rank, noted in notes.items():
        for span in noted:
            begin, end = span.begin - offsets[span.rank], span.end - offsets[rank]
            spans.append(fates.judge(span._replace(begin=begin, end=max(begin, end))))
    return untangled(spans)
