"""From a configuration to the objects of this rank, and from a prompt to its text.

On rank 0 `generate` yields tokens; on the other ranks `work` serves until rank 0 is done. Started by torchrun, a rank
is a process; without it, `Engine.from_config` runs all ranks as threads of this process.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flowspec import trace
from flowspec.comm import inproc
from flowspec.comm.base import STILL, Transport
from flowspec.comm.codec import Limits
from flowspec.comm.shaped import shaped
from flowspec.config import Config, load_config
from flowspec.core.costs import Costs
from flowspec.core.policies import make_policy
from flowspec.core.policies.continuous import Continuous
from flowspec.core.policy import PolicyConfig
from flowspec.core.request import Request, Sampling, need
from flowspec.draft.registry import make_drafter
from flowspec.models.families import family_of, read_config
from flowspec.models.manifest import Manifest
from flowspec.models.stage import load_head, load_stage, packs_weights, rehearse
from flowspec.preflight import check_prompt, check_run
from flowspec.runtime import wire
from flowspec.runtime.drafting import DraftThread
from flowspec.runtime.driver import Driver, Stats
from flowspec.runtime.waiting import receive
from flowspec.runtime.worker import Worker
from flowspec.text import Text, TextStream
from flowspec.trace import Span

log = logging.getLogger(__name__)


class Token(NamedTuple):
    """One token of the output, as it is committed."""

    id: int
    text: str
    """what became certain with it: whole characters, perhaps none"""
    accepted: bool
    """True: the draft had it and it was on its way already; False: the target's own"""
    gap: float
    """the target's lead of this token over the next best (logit; above temperature 0 perturbed log-probability)"""


@dataclass(frozen=True)
class Result:
    """What one generation was; the fields of the result JSON (seconds, tokens)."""

    method: str
    prompt_tokens: int
    new_tokens: int
    token_ids: list[int]
    text: str
    """what was streamed: `token_ids` decoded, without bytes at the end that are no whole character"""
    finish_reason: str
    """stop (an end token or a stop text), length (a limit), cancelled"""
    prefill_seconds: float
    """from the request to the first token known"""
    decode_seconds: float
    """from there to the last token"""
    tokens_per_second: float | None
    """(new_tokens - 1) / decode_seconds; None for one token"""
    accepted_per_segment: float
    """new tokens over returned segments"""
    accepted_tokens: int
    """new tokens that the draft had sent before the target picked them"""
    drafted_tokens: int
    forwarded_tokens: int
    """tree rows that the first stage computed"""
    stage_utilisation: list[float]
    """share of the request's time that each stage spent computing"""
    bookkeeping_ms: float
    """rank 0's own CPU time a segment sent: neither drafting, lm_head, sampling nor waiting"""
    stage_overhead_ms: list[float]
    """each stage's own CPU time a segment: neither the model's forward, lm_head, sampling nor waiting"""
    costs: dict[str, Any]
    """what the run has measured so far of the stages, the links and the drafter (core/costs.py): `simulate --costs` reads it"""
    stage_peak_mb: list[float]
    """most resident memory of each stage's process so far, MB"""
    world_size: int
    seed: int
    temperature: float
    emulated: bool
    """True: the times are those of an emulated cluster"""


class Generation:
    """An iterator of Token; `result` is there once it is exhausted, or closed after its first token."""

    def __init__(self, request: Request):
        self.request = request
        self._tokens: Iterator[Token] = iter(())
        self.result: Result | None = None
        self.spans: list[Span] = []
        """what all ranks did, once there is a result; empty unless `trace` is set"""
        self.explanation: list[str] = []
        """what the policy chose and why, once there is a result"""

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """Cancel what is not generated yet."""
        self._tokens.close()  # type: ignore[attr-defined]


class Engine:
    """One rank of a run. Use as a context manager, or call `close`."""

    def __init__(self, config: Config, manifest: Manifest, transport: Transport, on_close: Sequence[Callable[[], None]] = ()):
        transport = shaped(transport, config.emulate)
        self.config, self.manifest, self._transport = config, manifest, transport
        self.rank, self.topology = transport.rank, transport.topology
        self._on_close = list(on_close)
        self._requests = 0
        self.traced = config.trace is not None
        """note what all ranks do during the next requests (Generation.spans)"""
        self._spans: list[Span] = []
        self._running: Generation | None = None
        if self.rank == 0:
            self.text = Text(manifest.folder(0))
            self._driver = self._make_driver()

    @classmethod
    def from_config(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Engine:
        """The engine of a configuration file; `overrides` are `a.b=c` texts. UserError names what is wrong.

        Under torchrun this is the engine of this process's rank; otherwise of rank 0, with the stages as threads."""
        config = load_config(path, overrides)
        return cls.join(config) if "RANK" in os.environ else cls.over_threads(config, check_run(config))

    @classmethod
    def join(cls, config: Config) -> Engine:
        """The engine of this process's rank in a torchrun world."""
        from flowspec.runtime.agreement import facts_of
        from flowspec.runtime.process import check_world, join_run

        rank = int(os.environ["RANK"])
        topology = Manifest.load(config.stages_path).topology
        check_world(topology, config.emulate.shapes_links)
        manifest = check_run(config, [rank])
        set_threads(config, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        warm_up(config, manifest, rank)
        takes_part = rank > 0 or not config.verifies_last
        facts = facts_of(config.shared(), manifest, dtype_name(config, manifest, rank) if takes_part else None)
        transport, leave = join_run(topology, facts, wire_limits(config, manifest), config.emulate)
        return cls(config, manifest, transport, [leave])

    @classmethod
    def over_threads(cls, config: Config, manifest: Manifest) -> Engine:
        """Rank 0's engine with all stages as threads of this process."""
        set_threads(config, manifest.topology.world_size)
        first, *others = inproc.ring(manifest.topology)
        stages = [threading.Thread(target=_stage_thread, args=(config, manifest, end, first), daemon=True) for end in others]
        for thread in stages:
            thread.start()
        try:
            engine = cls(config, manifest, first, [functools.partial(thread.join, STILL) for thread in stages])
        except BaseException:
            for end in others:
                first.send_control(end.rank, wire.STOP)
            raise
        try:
            engine.wait_until_loaded()
        except BaseException:
            engine.close()
            raise
        return engine

    # ---- rank 0 ------------------------------------------------------------------------------------
    def wait_until_loaded(self, show: Callable[[int, dict], None] = lambda rank, facts: None) -> None:
        """Until every stage holds its weights; `show(rank, {megabytes, seconds})` on the way, with `what` when it is done. RankLost
        when one stands still."""
        waiting = self.topology.stages
        while waiting:
            rank, message = receive(self._transport)
            show(rank, message.meta)
            waiting -= message.kind == "loaded"

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        method: str | None = None,
        policy: PolicyConfig | None = None,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Generation:
        """The continuation of a prompt (text, or token ids) as an iterator of Token.

        `method`, `policy` and the keywords of `Sampling` (temperature, top_p, top_k, min_p, seed, max_new_tokens) default to the
        configuration's. Generation ends before a text in `stop`. One generation at a time: a new one cancels the last."""
        config = dataclasses.replace(self.config, method=method or self.config.method, policy=policy or self.config.policy)
        tokens = self.text.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        check_prompt(tokens, self.manifest)
        wanted = dataclasses.replace(config.sampling, **sampling)
        if self._running:
            self._running.close()
        self._requests += 1
        request = self._request(tokens, wanted)
        stops = [stop] if isinstance(stop, str) else list(stop)
        generation = Generation(request)
        generation._tokens = self._run(generation, request, config, stops)
        self._running = generation
        return generation

    def forget(self) -> None:
        """Forget the costs, weights and findings of the requests so far on all ranks: the next one is as the first of a run."""
        if self._running:
            self._running.close()
        self._driver.forget()

    def close(self) -> None:
        """End the run on every rank; idempotent."""
        try:
            if self._running:
                self._running.close()
            if self._spans:
                self._write_trace()
        finally:
            if self.rank == 0:
                if self._draft:
                    self._draft.close()
                for rank in self.topology.stage_ranks:
                    self._transport.send_control(rank, wire.STOP)
            self._transport.close()
            leaving, self._on_close = self._on_close, []
            for leave in leaving:
                leave()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_trace(self) -> None:
        """The timeline of all requests so far, into the file that `trace` names."""
        path, spans, self._spans = self.config.trace_path, self._spans, []
        facts = {"method": self.config.method, "stages": self.topology.stages, "emulated": self.config.emulate.active}
        trace.write(path, spans, facts)
        log.info("timeline written to %s", path)

    # ---- the other ranks ---------------------------------------------------------------------------
    def work(self) -> None:
        """Load this rank's stage and serve until rank 0 ends the run."""
        _work(self.config, self.manifest, self._transport)

    @property
    def dtype_name(self) -> str:
        """The computing dtype of the last stage."""
        return dtype_name(self.config, self.manifest, self.topology.last)

    @property
    def sums_in(self) -> str:
        """The dtype of rows and sums of the last stage, where `dtype_name` is that of its weights."""
        last = self.topology.last
        dtype = compute_dtype(self.config, self.manifest, last)
        packs = packs_weights(read_config(self.manifest.folder(last)), dtype, self.config.device_of(last))
        return "float32" if packs else self.dtype_name

    # ---- inside ------------------------------------------------------------------------------------
    def _make_driver(self) -> Driver:
        config, manifest = self.config, self.manifest
        dtype, device, pulse = compute_dtype(config, manifest, 0), checked_device(config, 0), self._transport.pulses[0]
        pulse.at("loading the drafter")
        head = load_head(manifest, 0, dtype, device) if 0 in config.head_ranks(manifest.topology) else None
        if head and config.deterministic:
            head.alone = True
        drafter = make_drafter(config.drafters, config.folder, manifest, head, dtype, device, lambda size: pulse.move())
        pulse.at()
        least = config.emulate.draft_ms / 1000 if config.computes else 0.0
        self._draft = DraftThread(drafter, self._transport.inbox, least) if drafter else None
        verifying = None if config.verifies_last else head
        return Driver(self._transport, self._draft, manifest.vocab_size, verifying, config.emulate.hidden_scale)

    def _request(self, tokens: tuple[int, ...], sampling: Sampling) -> Request:
        """With a seed, and no more new tokens than the model has positions for."""
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        room = self.manifest.max_positions - len(tokens)
        sampling = dataclasses.replace(sampling, seed=seed, max_new_tokens=min(sampling.max_new_tokens, room))
        return Request(id=self._requests, prompt=tokens, sampling=sampling, eos=self.text.eos)

    def _run(self, generation: Generation, request: Request, config: Config, stop: list[str]) -> Iterator[Token]:
        stats, ids, accepted = Stats(), [], 0
        stream = TextStream(self.text.tokenizer, stop, request.prompt)
        features = self._draft is not None and self._draft.features
        policy = make_policy(config.method, config.tree, config.policy, self.topology, features)
        tokens = self._driver.generate(request, policy, config.policy, stats, self.traced)
        try:
            for token in tokens:
                ids.append(token.id)
                accepted += token.accepted
                piece = stream.push(token.id) + (stream.flush() if token.final else "")
                yield Token(token.id, piece, token.accepted, token.gap)
                if stream.stopped:
                    stats.finish_reason = "stop"
                    break
        finally:
            tokens.close()
            generation.spans, generation.explanation = stats.spans, stats.explanation
            self._spans += stats.spans if config.trace else []
            generation.result = self._result(request, config, stats, ids, accepted, stream.text)

    def _result(self, request: Request, config: Config, stats: Stats, ids: list[int], accepted: int, text: str) -> Result:
        decode = stats.last_token - stats.first_token
        spent = max(stats.ended - stats.begun, 1e-9)
        stages = [stats.reports[rank] for rank in sorted(stats.reports)]
        return Result(
            method=config.method,
            prompt_tokens=request.prompt_length,
            new_tokens=len(ids),
            token_ids=ids,
            text=text,
            finish_reason=stats.finish_reason,
            prefill_seconds=(stats.first_token or stats.ended) - stats.begun,
            decode_seconds=decode,
            tokens_per_second=(len(ids) - 1) / decode if len(ids) > 1 and decode > 0 else None,
            accepted_per_segment=len(ids) / max(1, stats.returned_segments),
            accepted_tokens=accepted,
            drafted_tokens=stats.drafted,
            forwarded_tokens=stages[0].rows if stages else 0,
            stage_utilisation=[min(1.0, report.busy / spent) for report in stages],
            bookkeeping_ms=stats.bookkeeping * 1000 / max(1, stats.segments),
            stage_overhead_ms=[report.overhead * 1000 / max(1, report.segments) for report in stages],
            costs=self._costs(stats, stages).to_json(),
            stage_peak_mb=[round(report.peak_mb, 1) for report in stages],
            world_size=self.topology.world_size,
            seed=request.sampling.seed or 0,
            temperature=request.sampling.temperature,
            emulated=config.emulate.active,
        )

    def _costs(self, stats: Stats, stages: list[wire.Report]) -> Costs:
        return Costs(
            tuple(tuple(report.points) for report in stages),
            tuple(report.overhead / max(1, report.segments) for report in stages),
            tuple(report.row for report in stages),
            stats.hop,
            tuple(self._draft.cost.points()) if self._draft else (),
            self._draft.read if self._draft else 0.0,
            stats.bookkeeping / max(1, stats.segments),
        )


def warm_up(config: Config, manifest: Manifest, rank: int) -> None:
    """Import the model's code and wake the GPU before there are heartbeats to miss: it takes seconds, and holds the interpreter's lock."""
    device = checked_device(config, rank)
    if device != "cpu":
        one = torch.ones(1, 1, device=device)
        torch.mm(one, one)
    if rank > 0:
        family_of(read_config(manifest.folder(rank))).classes()
        return
    for drafter in config.drafters:
        if drafter.computes:
            family_of(read_config(drafter.checkpoint(config.folder))).classes()


def wire_limits(config: Config, manifest: Manifest) -> Limits:
    """What messages of a run with this configuration can hold."""
    tree = max(Continuous.CROWD, config.tree.budget or 0, config.tree.segment or 0)
    return wire.limits(tree, manifest.hidden_size, manifest.num_layers, manifest.max_positions)


def set_threads(config: Config, ranks_here: int) -> None:
    """CPU threads of a rank: as configured, or an equal share of the cores (torchrun alone would leave one)."""
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // ranks_here))


def checked_device(config: Config, rank: int) -> str:
    """cpu, or cuda:N: without a number the ranks of a host take its GPUs in turn, and share them if there are fewer."""
    device = config.device_of(rank)
    if device == "cpu":
        return device
    need(torch.cuda.is_available(), f"device is {device}, but torch sees no GPU on rank {rank}")
    number, count = device.partition(":")[2], torch.cuda.device_count()
    index = int(number) if number else int(os.environ.get("LOCAL_RANK", rank)) % count
    need(index < count, f"device is {device}, but torch sees {count} GPUs on rank {rank}, so cuda:{count - 1} is the last")
    return f"cuda:{index}"


def compute_dtype(config: Config, manifest: Manifest, rank: int) -> torch.dtype:
    """auto: float32 on a CPU (exact, and no slower on small models), the stored dtype elsewhere."""
    name = config.dtype
    if name == "auto":
        name = "float32" if config.device_of(rank) == "cpu" else manifest.dtype
    return getattr(torch, name)


def dtype_name(config: Config, manifest: Manifest, rank: int) -> str:
    """The computing dtype of a rank, such as float32."""
    return str(compute_dtype(config, manifest, rank)).removeprefix("torch.")


def _work(config: Config, manifest: Manifest, transport: Transport) -> None:
    rank, begun = transport.rank, time.monotonic()
    dtype, device = compute_dtype(config, manifest, rank), checked_device(config, rank)
    said = begun

    pulse = transport.pulses[rank]
    pulse.at("loading its weights")

    def progress(size: int) -> None:
        nonlocal said
        pulse.move()
        if time.monotonic() - said > 1.0:
            said = time.monotonic()
            transport.send_control(0, wire.loading(size / 1e6, said - begun))

    model = load_stage(manifest, rank, dtype, device, progress)
    head = load_head(manifest, rank, dtype, device) if rank == manifest.topology.last and config.verifies_last else None
    size = model.size / 1e6
    if config.deterministic:
        model.compute_alone()
        if head:
            head.alone = True
    rehearse(model, head)
    a, b = manifest.ranks[rank].layers
    transport.send_control(0, wire.loaded(size, time.monotonic() - begun, f"layers {a} to {b - 1}"))
    Worker(transport, model, head, config.emulate, a).run()


def _stage_thread(config: Config, manifest: Manifest, end: Transport, first: Transport) -> None:
    """A stage as a thread; what goes wrong in it is raised where rank 0 waits."""
    end = shaped(end, config.emulate)
    try:
        _work(config, manifest, end)
    except BaseException as error:
        first.inbox.fail(error)
    finally:
        end.close()
