"""A forecaster says what the simulator makes of a model pair's own prompts.

Real drafts and the target's text run in virtual time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowspec.comm.group import thread_links
from flowspec.config import Config
from flowspec.core.cost import Emulate, Group
from flowspec.core.costs import Costs
from flowspec.core.policies import ALL_METHODS, METHODS, SERVED, SHARED, make_policy, spreads
from flowspec.core.request import Request, Sampling
from flowspec.core.topology import Topology
from flowspec.draft.base import Drafter
from flowspec.draft.config import DrafterConfig
from flowspec.draft.recorded import (
    LiveDrafter,
    RecordedDrafter,
    SyntheticDrafter,
    Tape,
    load,
    made_up_text,
    save,
)
from flowspec.draft.registry import make_drafter
from flowspec.errors import need
from flowspec.models import stage
from flowspec.models.manifest import Manifest
from flowspec.sampling import noise_for
from flowspec.sim.lockstep import LockStep
from flowspec.sim.world import Guesser, Job, Outcome, RingSpec, World

PAPER = "flowspec-paper"
"""This is FlowSpec's published lock-step policy, which is only simulated (sim/lockstep.py)."""
SIMULATED = (*ALL_METHODS, PAPER)


def usual(topology: Topology) -> list[str]:
    """Return the methods that are compared over a ring if nobody says which."""
    shared = SHARED if topology.members > 1 else ()
    served = SERVED if topology.servers > 1 else ()
    return [*METHODS, *shared, *served, PAPER]


@dataclass(frozen=True, kw_only=True)
class Models:
    """These are the facts that the simulator needs of a pair of models.

    Recorded drafts of another pair are refused."""

    name: str
    vocabulary: int
    hidden: int

    @classmethod
    def of(cls, config: Config) -> Models:
        manifest = Manifest.load(config.stages_path)
        head = manifest.ranks[0].lm_head
        drafters = " + ".join(_named(drafter, config.folder) for drafter in config.drafters)
        name = f"target {head.sha256[:16] if head else '?'}, {drafters}"
        return cls(name=name, vocabulary=manifest.vocab_size, hidden=manifest.hidden_size)


def _named(drafter: DrafterConfig, folder: Path) -> str:
    """Return the name of a drafter in a tape's source.

    It is the drafter's kind, and its weights if the tape holds what they make."""
    weights = (
        sorted(drafter.checkpoint(folder).glob("*.safetensors")) if drafter.kind == "lm" else []
    )
    return " ".join([drafter.kind, *(f"{w.name} of {w.stat().st_size} bytes" for w in weights)])


def is_taped(config: Config) -> bool:
    """Return whether a tape can remember the proposals, which then depend on the path only.

    Other drafters are asked live (draft/recorded.py)."""
    return all(drafter.kind in ("lm", "none") for drafter in config.drafters)


def emulated(config: Config) -> Emulate:
    """Return the times that a real run of this configuration would take: a look-up has no
    forward."""
    return config.emulate if config.computes else dataclasses.replace(config.emulate, draft_ms=0.0)


def obstacle(config: Config) -> str | None:
    """Return why there can be no simulation, or None.

    Features of the text take the whole target, and those of layers are on no virtual wire."""
    config = config.found()
    late = next((drafter.where for drafter in config.drafters if drafter.kind == "eagle3"), None)
    if late:
        return (
            f"{late}.kind is eagle3: it cannot be simulated, since the simulator does not "
            "carry the features of layers"
        )
    manifest = Manifest.load(config.stages_path)
    needed = [manifest.path(entry) for entry in manifest.ranks[1:]] if config.reads_features else []
    file = next((path for path in needed if not path.exists()), None)
    return (
        f"drafter.kind eagle is simulated with the whole target, and {file} is not on this machine"
        if file
        else None
    )


def check_simulable(config: Config) -> None:
    """Raise UserError if there is an obstacle."""
    found = obstacle(config)
    need(not found, found or "")


class Target:
    """The target is put together out of the files of its stages.

    It computes the features of a text that is known."""

    def __init__(self, manifest: Manifest):
        ring = manifest.topology
        self._stages = [
            [
                stage.load_stage(manifest, rank, torch.float32, "cpu", links=links)
                for rank, links in zip(ring.group(leader), thread_links(ring.members), strict=True)
            ]
            for leader in ring.stage_ranks
        ]

    def features(self, tokens: Sequence[int]) -> Tensor:
        """Return the features behind the final norm, [len(tokens), hidden]."""
        rows = torch.tensor(tokens, dtype=torch.int32)
        for shards in self._stages:
            texts = [stage.CachedText(shard) for shard in shards]
            with ThreadPoolExecutor(len(texts)) as members:
                rows, *_ = members.map(lambda text, rows=rows: text.prefill(rows), texts)
        return rows


Key = tuple[tuple[int, ...], Sampling]


def _key(request: Request) -> Key:
    """Return what the text of a request depends on."""
    return request.prompt, request.sampling


class Forecaster:
    """A forecaster predicts runs.

    Drafts of a language model are remembered by path, so that a sweep asks it once. Other drafters
    are asked live, with the target's features of the text, computed once, if they read them."""

    def __init__(self, config: Config, models: Models):
        self.config, self.models = config, models
        self.tapes: dict[Key, Tape] = {}
        self.profile: Sequence[float] | None = None
        """This is the profile of an invented drafter, which replaces the configured one; None if
        there is none."""
        self.offline = False
        """If it is set, the draft model is not loaded: what was not recorded is not drafted."""
        self.lacked = 0
        """So many proposals were not recorded, offline."""
        self._features: dict[Key, Tensor] = {}

    def add(self, request: Request, text: Sequence[int]) -> Tape:
        """Return the tape of a request; it is new if it is not known yet."""
        return self.tapes.setdefault(_key(request), Tape(request, list(text)))

    def run(
        self,
        tape: Tape,
        method: str,
        topology: Topology,
        emulate: Emulate | None = None,
        config: Config | None = None,
        costs: Costs | None = None,
    ) -> Outcome:
        """Run one request in virtual time, as `together` does.

        If the method is FlowSpec as published, it runs in lock step."""
        if method != PAPER:
            (outcome,) = self.together([tape], method, topology, emulate, config, costs)
            return outcome
        config = config or self.config
        guesser = self._guesser(tape, config)
        need(guesser is not None, f"{PAPER} needs a drafter")
        assert guesser is not None
        ring = self._ring(topology, method, emulate, config, costs, guesser.features)
        outcome = LockStep(tape.request, tape.text, config.tree, guesser, ring).run()
        return self._checked(outcome, tape, method, guesser)

    def together(
        self,
        tapes: Sequence[Tape],
        method: str,
        topology: Topology,
        emulate: Emulate | None = None,
        config: Config | None = None,
        costs: Costs | None = None,
    ) -> list[Outcome]:
        """Run requests that all come at once, in virtual time.

        `config` may have another tree, policy or verify_on than the forecaster's own. `costs` are
        measured ones, which count instead of what is emulated."""
        config = config or self.config
        reads = self.profile is None and config.reads_features
        jobs = []
        for number, tape in enumerate(tapes, 1):
            policy = make_policy(method, config.tree, config.policy, topology, reads, config.dsi)
            guesser = self._guesser(tape, config) if policy.drafts else None
            request = dataclasses.replace(tape.request, id=number)
            jobs.append(Job(request, tape.text, policy, guesser, config.policy))
        features = any(job.guesser is not None and job.guesser.features for job in jobs)
        ring = self._ring(topology, method, emulate, config, costs, features)
        outcomes = World(ring, jobs).run()
        return [
            self._checked(outcome, tape, method, job.guesser)
            for outcome, tape, job in zip(outcomes, tapes, jobs, strict=True)
        ]

    def _ring(
        self,
        topology: Topology,
        method: str,
        emulate: Emulate | None,
        config: Config,
        costs: Costs | None,
        features: bool,
    ) -> RingSpec:
        return RingSpec(
            stages=topology.stages,
            group=Group(topology.members, spreads(method)),
            emulate=emulate or (emulated(config) if self.profile is None else config.emulate),
            hidden=self.models.hidden,
            verify_last=config.verifies_last,
            features=features,
            costs=costs,
            servers=topology.servers,
        )

    def _checked(
        self, outcome: Outcome, tape: Tape, method: str, guesser: Guesser | None
    ) -> Outcome:
        if isinstance(guesser, RecordedDrafter):
            self.lacked += guesser.lacked
        if outcome.tokens != tape.text:
            raise AssertionError(f"{method} wrote another text in virtual time: a bug")
        return outcome

    def _guesser(self, tape: Tape, config: Config) -> Guesser | None:
        if self.profile is not None:
            return SyntheticDrafter(tape.request, tape.text, self.profile, seed=tape.request.id)
        if config.drafters[0].kind == "none":
            return None
        if self.offline:
            return RecordedDrafter(tape)
        noise = (
            noise_for(tape.request.sampling, self.models.vocabulary)
            if config.policy.coupled
            else None
        )
        if is_taped(config):
            return RecordedDrafter(tape, self._drafter, noise)
        return LiveDrafter(
            self._drafter,
            tape.request,
            noise,
            self._features_of(tape) if self._drafter.features else None,
        )

    @functools.cached_property
    def _drafter(self) -> Drafter:
        config, manifest = self.config, Manifest.load(self.config.stages_path)
        head = stage.load_head(manifest, 0, torch.float32, "cpu") if config.needs_lm_head else None
        drafter = make_drafter(config.drafters, config.folder, manifest, head, torch.float32, "cpu")
        assert drafter is not None
        return drafter

    @functools.cached_property
    def _target(self) -> Target:
        check_simulable(self.config)
        return Target(Manifest.load(self.config.stages_path))

    def _features_of(self, tape: Tape) -> Tensor:
        """Return the target's features at all tokens of the prompt and the text but the last.

        They are the same in every cell of a sweep."""
        key = _key(tape.request)
        if key not in self._features:
            self._features[key] = self._target.features([*tape.request.prompt, *tape.text[:-1]])
        return self._features[key]

    # ---- files -----------------------------------------------------------------------------------
    def save(self, path: Path) -> None:
        """Save all tapes; `load` refuses them for other models or another coupling."""
        save(path, self.tapes.values(), self._source)

    def load(self, path: Path) -> None:
        tapes, source = load(path)
        need(
            source == self._source,
            f"{path} was recorded with {source}; this configuration is {self._source}",
        )
        self.tapes |= {_key(t.request): t for t in tapes}

    @property
    def _source(self) -> str:
        return f"{self.models.name}, {'' if self.config.policy.coupled else 'not '}coupled"


def made_up(
    config: Config, profile: Sequence[float], requests: int, hidden: int | None = None
) -> Forecaster:
    """Return a forecaster without models, whose acceptance is random.

    `profile[k]` is the probability that the target's token is the draft's k-th choice. A row of
    features has `hidden` elements; None stands for as many as weigh like 4096."""
    need(
        all(p >= 0 for p in profile) and 0 < sum(profile) <= 1,
        "--synthetic: shares between 0 and 1 that sum up to at most 1",
    )
    if hidden is None:
        scale = config.emulate.hidden_scale
        hidden = round(4096 / scale) if scale else 0
    models = Models(name="synthetic", vocabulary=1 << 31, hidden=hidden)
    forecaster = Forecaster(config, models)
    forecaster.profile = profile
    for k in range(requests):
        sampling = dataclasses.replace(config.sampling, seed=k)
        request = Request(id=k, prompt=tuple(range(64)), sampling=sampling)
        forecaster.add(request, made_up_text(sampling.max_new_tokens))
    return forecaster


def rate(outcomes: Iterable[Outcome]) -> float:
    """Return the tokens/s of several requests: all tokens over all decode time."""
    outcomes = list(outcomes)
    tokens = sum(len(o.tokens) - 1 for o in outcomes)
    return tokens / max(1e-9, sum(o.last_token - o.first_token for o in outcomes))
