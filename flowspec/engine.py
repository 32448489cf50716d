"""The engine is rank 0: it makes a run of a configuration, and text of prompts.

Every other rank is rank.py. Under torchrun a rank is a process; without it, `Engine.from_config`
runs all ranks as threads of this process."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from flowspec import trace
from flowspec.comm import inproc
from flowspec.comm.base import STILL, Transport
from flowspec.comm.shaped import shaped
from flowspec.config import Config, load_config
from flowspec.core.costs import Costs
from flowspec.core.policies import make_policy, spreads
from flowspec.core.policy import PolicyConfig
from flowspec.core.request import Request, Sampling
from flowspec.core.sight import Sight
from flowspec.draft.config import DrafterConfig
from flowspec.draft.registry import make_drafter
from flowspec.errors import need
from flowspec.generation import Generation, Result
from flowspec.models import fourbit
from flowspec.models.families import read_config
from flowspec.models.manifest import Manifest
from flowspec.models.stage import load_head, packs_weights
from flowspec.preflight import check_prompt, check_run
from flowspec.rank import (
    checked_device,
    compute_dtype,
    dtype_name,
    join,
    set_threads,
    work_as_thread,
)
from flowspec.runtime import wire
from flowspec.runtime.drafting import DraftThread
from flowspec.runtime.driver import Driver, Load, Stats, Submission
from flowspec.runtime.pool import PoolDrafter
from flowspec.runtime.waiting import receive
from flowspec.sampling import settled
from flowspec.text import Text, TextStream
from flowspec.trace import Span

if TYPE_CHECKING:
    from flowspec.runtime.process import Losses

log = logging.getLogger(__name__)


class Engine:
    """The engine is rank 0 of a run. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        transport: Transport,
        on_close: Sequence[Callable[[], None]] = (),
        losses: Losses | None = None,
    ):
        transport, config = shaped(transport, config.emulate), config.found()
        self.config, self.manifest, self._transport = config, manifest, transport
        self.topology = transport.topology
        self._on_close, self._losses = list(on_close), losses
        self._requests = 0
        self._lock = threading.Lock()
        self.traced = config.trace is not None
        """If it is set, all ranks note what they do during the next requests (Generation.spans)."""
        self._spans: list[Span] = []
        self._running: weakref.WeakSet[Generation] = weakref.WeakSet()
        self._last: Generation | None = None
        self.text = Text(manifest.folder(0))
        self._driver = self._make_driver()

    @classmethod
    def from_config(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Engine:
        """Return the engine of a configuration file; `overrides` are `a.b=c` texts.

        Raise UserError, which names what is wrong. Under torchrun this process must be rank 0, and
        the others call `flowspec.serve`; otherwise the stages are threads of this process."""
        config = load_config(path, overrides)
        return (
            cls.join(config)
            if "RANK" in os.environ
            else cls.over_threads(config, check_run(config))
        )

    @classmethod
    def join(cls, config: Config) -> Engine:
        """Return the engine of a torchrun world, of which this process is rank 0.

        The others call `flowspec.serve`."""
        need(
            os.environ["RANK"] == "0",
            f"rank {os.environ['RANK']} is a stage: call flowspec.serve there, an Engine is rank 0",
        )
        member = join(config)
        return cls(config, member.manifest, member.transport, [member.leave], member.losses)

    @classmethod
    def over_threads(cls, config: Config, manifest: Manifest) -> Engine:
        """Return rank 0's engine, with all stages as threads of this process."""
        set_threads(config, manifest.topology.world_size)
        first, *others = inproc.ring(manifest.topology)
        stages = [
            threading.Thread(
                target=work_as_thread, args=(config, manifest, end, first), daemon=True
            )
            for end in others
        ]
        for thread in stages:
            thread.start()
        try:
            engine = cls(
                config,
                manifest,
                first,
                [functools.partial(thread.join, STILL) for thread in stages],
            )
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

    # ---- requests --------------------------------------------------------------------------------
    def wait_until_loaded(
        self, show: Callable[[int, dict], None] = lambda rank, facts: None
    ) -> None:
        """Wait until every rank holds its weights; raise RankLost if one stands still.

        `show(rank, {megabytes, seconds})` is called on the way, and with `what` when the rank is
        done."""
        waiting = len(self.topology.control_peers(0))
        while waiting:
            rank, message = receive(self._transport)
            show(rank, message.meta)
            if message.kind == "loaded":
                waiting -= 1
                if self.topology.leads(rank):
                    self._driver.has_room(rank, message.meta["cache_rows"])
        if self._losses:
            self._losses.tell = self._driver.lost

    def before_the_end(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called, in any thread, with what became of a lost rank before this process
        ends for it."""
        if self._losses:
            self._losses.before_the_end = tell

    @property
    def error(self) -> BaseException | None:
        """Return what broke the run, if something did."""
        return self._driver.error

    @property
    def load(self) -> Load:
        """Return how full the ring is."""
        return self._driver.load

    def look(self, requests: Collection[int] = ()) -> Future[Sight]:
        """Ask for what can be seen of the ring, and of the trees of these requests, soon.

        The ring waits for nobody who looks. The future stays without a result if the run breaks."""
        return self._driver.look(requests)

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        method: str | None = None,
        policy: PolicyConfig | None = None,
        stop: str | Sequence[str] = (),
        known: Sequence[int] = (),
        **sampling: Any,
    ) -> Generation:
        """Begin with the continuation of a prompt (text, or token ids).

        Return an iterator of Token, to be read from any thread or by `async for`. Any number of
        requests may be in the ring; the text of none depends on the others. `method`, `policy` and
        the keywords of `Sampling` (temperature, top_p, presence_penalty, logit_bias, logprobs,
        seed, max_new_tokens and the others) default to the configuration's. Generation ends before
        a text in `stop`. The first tokens of the text may be `known`, as of a run that broke: with
        the same seed it goes on as it would have, and they count as new tokens. Raise UserError,
        which says what is wrong with the request."""
        config = dataclasses.replace(
            self.config, method=method or self.config.method, policy=policy or self.config.policy
        )
        asked = self.text.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        tokens = (*asked, *known)
        check_prompt(tokens, self.manifest)
        settings = dataclasses.replace(config.sampling, **sampling)
        settings.check(self.manifest.vocab_size)
        left = dataclasses.replace(settings, max_new_tokens=settings.max_new_tokens - len(known))
        config.check_method(self.topology.members)
        with self._lock:
            self._requests += 1
            request = self.request(tokens, left, self._requests, len(known))
        features = self._draft is not None and self._draft.features
        chosen = make_policy(
            config.method, config.tree, config.policy, self.topology, features, config.dsi
        )
        stops = [stop] if isinstance(stop, str) else list(stop)
        submission = Submission(request, chosen, config.policy, self.traced, spreads(config.method))
        self._driver.check(submission)
        generation = Generation(
            request,
            self._driver.submit(submission),
            TextStream(self.text.tokenizer, stops, asked),
            functools.partial(self._finished, config),
            known,
        )
        self._running.add(generation)
        return generation

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Do as `submit` does, for one request at a time.

        What the last call of `generate` began is cancelled if it still goes on."""
        if self._last is not None:
            self._last.close()
        self._last = self.submit(prompt, **options)
        return self._last

    def forget(self) -> None:
        """Forget the costs, weights and findings of the requests so far on all ranks.

        The next request is like the first of a run. What still goes on is cancelled."""
        self._cancel_all()
        self._driver.forget()

    def _cancel_all(self) -> None:
        for generation in [*self._running]:
            if not generation.done:
                generation.close()

    def close(self) -> None:
        """End the run on every rank; a second call does no harm."""
        try:
            self._cancel_all()
            if self._spans:
                self._write_trace()
        finally:
            self._driver.close()
            if self._draft:
                self._draft.close()
            for rank in self.topology.control_peers(0):
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
        """Write the timeline of all requests so far into the file that `trace` names."""
        path, spans, self._spans = self.config.trace_path, self._spans, []
        facts = {
            "method": self.config.method,
            "stages": self.topology.stages,
            "emulated": self.config.emulate.active,
        }
        if self.topology.servers > 1:
            facts["servers"] = self.topology.servers
        trace.write(path, spans, facts)
        log.info("timeline written to %s", path)

    @property
    def dtype_name(self) -> str:
        """Return the computing dtype of the last stage."""
        return dtype_name(self.config, self.manifest, self.topology.last)

    @property
    def sums_in(self) -> str:
        """Return the coarsest dtype of any stage's rows and sums, where `dtype_name` is that of
        weights."""
        found = [self._sums_of(leader) for leader in self.topology.ring(0)]
        return max(found, key=lambda name: torch.finfo(getattr(torch, name)).eps)

    def _sums_of(self, rank: int) -> str:
        """Return the dtype of the rows and sums of the stage that this rank leads."""
        device = self.config.device_of(rank)
        if device == "cpu" and dtype_name(self.config, self.manifest, rank) == "nf4":
            return fourbit.SUMS_ON_CPU
        dtype = compute_dtype(self.config, self.manifest, rank)
        packs = packs_weights(read_config(self.manifest.folder(0)), dtype, device)
        shared = self.topology.members > 1 and self.config.tensor_parallel.backend != "native"
        return "float32" if packs and not shared else str(dtype).removeprefix("torch.")

    # ---- inside ----------------------------------------------------------------------------------
    def _make_driver(self) -> Driver:
        config, manifest = self.config, self.manifest
        dtype, device, pulse = (
            compute_dtype(config, manifest, 0),
            checked_device(config, 0),
            self._transport.pulses[0],
        )
        pulse.at("loading the drafter")
        head = (
            load_head(manifest, 0, dtype, device)
            if 0 in config.head_ranks(manifest.topology)
            else None
        )
        if head and config.deterministic:
            head.alone = True
        pools: dict[int, PoolDrafter] = {}

        def pool(drafter: DrafterConfig) -> PoolDrafter:
            first = len(pools)
            ranks = self.topology.drafter_ranks[first : first + drafter.ranks]
            made = PoolDrafter(self._transport, ranks)
            pools.update(dict.fromkeys(ranks, made))
            return made

        drafter = make_drafter(
            config.drafters,
            config.folder,
            manifest,
            head,
            dtype,
            device,
            lambda size: pulse.move(),
            pool,
        )
        pulse.at()
        here = any(drafter.computes for drafter in config.drafters_on(self.topology, 0))
        least = config.emulate.draft_ms / 1000 if here else 0.0
        self._draft = DraftThread(drafter, self._transport.inbox, least) if drafter else None
        verifying = None if config.verifies_last else head
        return Driver(
            self._transport,
            self._draft,
            manifest.vocab_size,
            verifying,
            config.emulate.hidden_scale,
            pools,
        )

    def request(
        self, tokens: tuple[int, ...], sampling: Sampling, id: int = 0, known: int = 0
    ) -> Request:
        """Return the request for these tokens, of which the last are `known` ones of its text.

        It has a seed, and at most as many new tokens as the model has positions for."""
        sampling = settled(sampling, self.manifest.max_positions - len(tokens))
        return Request(id=id, prompt=tokens, sampling=sampling, eos=self.text.eos, known=known)

    def _finished(self, config: Config, generation: Generation) -> Result:
        """Return the result of a generation whose stream has ended."""
        request, stats, ids = generation.request, generation.stats, generation.token_ids
        self._spans += stats.spans if config.trace else []
        decode, made = stats.last_token - stats.first_token, len(ids) - generation.known
        spent = max(stats.ended - stats.begun, 1e-9)
        stages = [stats.reports[rank] for rank in sorted(stats.reports)]
        return Result(
            method=config.method,
            prompt_tokens=request.prompt_length - generation.known,
            new_tokens=len(ids),
            known_tokens=generation.known,
            token_ids=ids,
            text=generation.text,
            finish_reason=stats.finish_reason,
            prefill_seconds=(stats.first_token or stats.ended) - stats.begun,
            decode_seconds=decode,
            tokens_per_second=(made - 1) / decode if made > 1 and decode > 0 else None,
            accepted_per_segment=made / max(1, stats.returned_segments),
            accepted_tokens=generation.accepted,
            drafted_tokens=stats.drafted,
            forwarded_tokens=sum(
                report.rows
                for rank, report in stats.reports.items()
                if self.topology.is_first(rank)
            ),
            stage_utilisation=[min(1.0, report.busy / spent) for report in stages],
            bookkeeping_ms=stats.bookkeeping * 1000 / max(1, stats.segments),
            stage_overhead_ms=[
                report.overhead * 1000 / max(1, report.segments) for report in stages
            ],
            costs=self._costs(stats, stages).to_json(),
            stage_peak_mb=[round(report.peak_mb, 1) for report in stages],
            world_size=self.topology.world_size,
            seed=request.sampling.seed or 0,
            temperature=request.sampling.temperature,
            emulated=config.emulate.active,
            logprobs=generation.logprobs,
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
