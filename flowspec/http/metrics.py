"""What a server has counted and timed, as Prometheus reads it.

With vLLM's names its dashboards and load generators can read it too: where we count the same
thing."""

from __future__ import annotations

import bisect
import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from flowspec.generation import Result
    from flowspec.runtime.driver import Load, Stats

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
"""Upper bounds of the histograms, in seconds."""


class Name(NamedTuple):
    """A metric's name, its name with vLLM (None: it has none), its kind and what it says."""

    ours: str
    vllm: str | None
    kind: str
    help: str


NAMES = {
    name.ours: name
    for name in (
        Name("requests_total", "request_success_total", "counter", "texts by why they ended"),
        Name("requests_running", "num_requests_running", "gauge", "texts in the ring"),
        Name("requests_waiting", "num_requests_waiting", "gauge", "texts that wait for room"),
        Name("prompt_tokens_total", "prompt_tokens_total", "counter", "tokens of prompts"),
        Name("generated_tokens_total", "generation_tokens_total", "counter", "new tokens"),
        Name(
            *("drafts_total", "spec_decode_num_drafts_total", "counter"),
            "runs of accepted tokens, empty ones too, each ended by a token of the target's own",
        ),
        Name(
            *("draft_tokens_total", "spec_decode_num_draft_tokens_total", "counter"),
            "drafted tokens sent into the ring",
        ),
        Name(
            *("accepted_tokens_total", "spec_decode_num_accepted_tokens_total", "counter"),
            "drafted tokens that became text",
        ),
        Name(
            "accepted_tokens_per_position_total",
            "spec_decode_num_accepted_tokens_per_pos_total",
            *("counter", "the same, by their place in the run"),
        ),
        Name("cache_usage_ratio", "kv_cache_usage_perc", "gauge", "share of cache rows promised"),
        Name("cache_rows", None, "gauge", "cache rows of a stage promised to texts in the ring"),
        Name("cache_rows_limit", None, "gauge", "cache rows of the stage that has the fewest"),
        Name("rows_computed_total", None, "counter", "tree rows that a stage has computed"),
        Name(
            *("stage_busy_ratio", None, "gauge"),
            "share of the last text's time that a stage spent computing",
        ),
        Name(
            *("time_to_first_token_seconds", "time_to_first_token_seconds", "histogram"),
            "from a request to its first token",
        ),
        Name(
            *("inter_token_seconds", "inter_token_latency_seconds", "histogram"),
            "from a token to the next",
        ),
        Name(
            *("request_seconds", "e2e_request_latency_seconds", "histogram"),
            "from a request to the end of its text",
        ),
    )
}
LABELS = {"finish": "finished_reason"}
"""This maps a label of ours to vLLM's."""


class Histogram:
    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += times
        self.sum += seconds * times

    def lines(self) -> Iterator[tuple[str, str, float]]:
        """Yield (what follows the name, label, value)."""
        total = 0
        for bound, count in zip((*BOUNDS, "+Inf"), self.counts, strict=True):
            total += count
            yield "_bucket", f'le="{bound}"', total
        yield "_sum", "", self.sum
        yield "_count", "", total


class Metrics:
    """The books of a server."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """This maps (name, label, its value) to how often."""
        self.busy: dict[int, float] = {}
        self.first, self.between, self.whole = Histogram(), Histogram(), Histogram()
        self._recent: deque[float] = deque(maxlen=16)

    def watch(self, begun: float) -> Watch:
        return Watch(self, begun)

    def count(self, name: str, times: int, label: str = "", value: str = "") -> None:
        self.counts[name, label, value] += times

    def failed(self) -> None:
        self.count("requests_total", 1, "finish", "failed")

    @property
    def usual_seconds(self) -> float:
        """Return what a text took of late; 0 if none was made."""
        return sum(self._recent) / max(1, len(self._recent))

    def ended(self, seconds: float) -> None:
        self.whole.add(seconds)
        self._recent.append(seconds)

    # ---- as text ---------------------------------------------------------------------------------
    def text(self, model: str, load: Load | None, vllm: bool) -> str:
        """Return the page, in our names or, where it has one, in vLLM's."""
        return "".join(f"{line}\n" for line in self._lines(model, load, vllm))

    def _lines(self, model: str, load: Load | None, vllm: bool) -> Iterator[str]:
        values = [*self._values(load)]
        for name in NAMES.values():
            own = [value for value in values if value[0] == name.ours]
            theirs = vllm and name.vllm is not None
            title = f"vllm:{name.vllm}" if theirs else f"flowspec_{name.ours}"
            if own:
                yield f"# HELP {title} {name.help}"
                yield f"# TYPE {title} {name.kind}"
            for _, more, label, value in own:
                key, sign, rest = label.partition("=")
                label = f"{LABELS.get(key, key) if theirs else key}{sign}{rest}"
                model_name = f'model_name="{_escaped(model)}"'
                yield f"{title}{more}{{{','.join(filter(None, (model_name, label)))}}} {value!r}"

    def _values(self, load: Load | None) -> Iterable[tuple[str, str, str, float]]:
        """Yield (name, what follows it, label, value)."""
        for name in NAMES.values():
            if name.kind == "counter" and not any(key[0] == name.ours for key in self.counts):
                yield name.ours, "", "", 0
        for (ours, label, value), times in sorted(self.counts.items()):
            yield ours, "", f'{label}="{value}"' if label else "", times
        for stage, share in sorted(self.busy.items()):
            yield "stage_busy_ratio", "", f'stage="{stage}"', share
        if load:
            yield "requests_running", "", "", load.running
            yield "requests_waiting", "", "", load.waiting
            yield "cache_rows", "", "", load.rows
            if load.room < math.inf:
                yield "cache_rows_limit", "", "", load.room
                yield "cache_usage_ratio", "", "", load.rows / load.room
        for name_, histogram in (
            ("time_to_first_token_seconds", self.first),
            ("inter_token_seconds", self.between),
            ("request_seconds", self.whole),
        ):
            for more, label, found in histogram.lines():
                yield name_, more, label, found


class Watch:
    """What is noted of one text while it is read."""

    def __init__(self, metrics: Metrics, begun: float):
        self._metrics, self._begun, self._last = metrics, begun, begun
        self._tokens = self._run = 0
        self._positions: Counter[int] = Counter()
        self._drafts = 0

    def token(self, accepted: bool) -> None:
        now = time.monotonic()
        (self._metrics.between if self._tokens else self._metrics.first).add(now - self._last)
        self._last = now
        self._tokens += 1
        if accepted:
            self._positions[self._run] += 1
            self._run += 1
        else:
            self._run = 0
            self._drafts += 1

    def over(self, result: Result, stats: Stats) -> None:
        metrics = self._metrics
        metrics.count("requests_total", 1, "finish", result.finish_reason)
        metrics.count("prompt_tokens_total", result.prompt_tokens)
        metrics.count("generated_tokens_total", result.new_tokens)
        metrics.ended(time.monotonic() - self._begun)
        if stats.guesses:
            metrics.count("drafts_total", self._drafts)
            metrics.count("draft_tokens_total", stats.guesses)
            metrics.count("accepted_tokens_total", sum(self._positions.values()))
        for position, times in self._positions.items():
            metrics.count("accepted_tokens_per_position_total", times, "position", str(position))
        for stage, (rank, share) in enumerate(
            zip(sorted(stats.reports), result.stage_utilisation, strict=True), 1
        ):
            metrics.busy[stage] = share
            metrics.count("rows_computed_total", stats.reports[rank].rows, "stage", str(stage))


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
