"""What the simulator says of a model pair's own prompts: real drafts and the target's text, in virtual time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowspec.config import Config
from flowspec.core.cost import Emulate
from flowspec.core.policy import METHODS, make_policy
from flowspec.core.request import Request, Sampling, need
from flowspec.draft.base import Drafter
from flowspec.draft.recorded import RecordedDrafter, SyntheticDrafter, Tape, load, made_up_text, save
from flowspec.models.manifest import Manifest
from flowspec.sim.lockstep import LockStep
from flowspec.sim.world import Guesser, Outcome, Ring, World

PAPER = "flowspec-paper"
"""FlowSpec's published lock-step policy: simulated only (sim/lockstep.py)"""
SIMULATED = (*METHODS, PAPER)


@dataclass(frozen=True, kw_only=True)
class Models:
    """What the simulator needs to know of a pair: recorded drafts of another pair are refused."""

    name: str
    vocabulary: int
    hidden: int

    @classmethod
    def of(cls, config: Config) -> Models:
        manifest = Manifest.load(config.stages_path)
        head = manifest.ranks[0].lm_head
        name = f"target {head.sha256[:16] if head else '?'}, {config.drafter.kind}"
        if config.drafter.kind == "lm":
            weights = sorted(config.drafter.checkpoint(config.folder).glob("*.safetensors"))
            name += " " + " ".join(f"{w.name} of {w.stat().st_size} bytes" for w in weights)
        return cls(name=name, vocabulary=manifest.vocab_size, hidden=manifest.hidden_size)


def check_simulable(config: Config) -> None:
    """UserError for a drafter that cannot be asked without the target."""
    kind = config.drafter.kind
    need(not config.drafter.reads_features, f"drafter.kind {kind} cannot be simulated yet: it reads the target's features, a text has none")


class Forecaster:
    """Predicts runs. Drafts of a language model are remembered by path, so that a sweep asks it once; others are asked live."""

    def __init__(self, config: Config, models: Models):
        self.config, self.models = config, models
        self.tapes: dict[tuple[tuple[int, ...], Sampling], Tape] = {}
        self.profile: Sequence[float] | None = None
        """of a made-up drafter, instead of the configured one"""
        self.offline = False
        """do not load the draft model: what was not recorded is not drafted"""
        self.lacked = 0
        """proposals that were not recorded, offline"""
        self._drafter: Drafter | None = None

    def add(self, request: Request, text: Sequence[int]) -> Tape:
        """The tape of a request, new if it is not known yet."""
        return self.tapes.setdefault((request.prompt, request.sampling), Tape(request, list(text)))

    def run(self, tape: Tape, method: str, stages: int, emulate: Emulate | None = None, config: Config | None = None) -> Outcome:
        """One request in virtual time. `config`: another tree, policy or verify_on than the forecaster's own."""
        config = config or self.config
        ring = Ring(stages=stages, emulate=emulate or config.emulate, hidden=self.models.hidden, verify_last=config.verifies_last)
        guesser = self._guesser(tape, config)
        if method == PAPER:
            need(guesser is not None, f"{PAPER} needs a drafter")
            assert guesser is not None
            outcome = LockStep(tape.request, tape.text, config.tree, guesser, ring).run()
        else:
            policy = make_policy(method, config.tree, config.policy, stages, config.drafter.reads_features)
            outcome = World(tape.request, tape.text, policy, guesser, ring, config.policy).run()
        if isinstance(guesser, RecordedDrafter):
            self.lacked += guesser.lacked
        if outcome.tokens != tape.text:
            raise AssertionError(f"{method} wrote another text in virtual time: a bug")
        return outcome

    def _guesser(self, tape: Tape, config: Config) -> Guesser | None:
        if self.profile is not None:
            return SyntheticDrafter(tape.request, tape.text, self.profile, seed=tape.request.id)
        if config.drafter.kind == "none":
            return None
        check_simulable(config)
        if self.offline:
            return RecordedDrafter(tape)
        from flowspec.sampling import noise_for

        noise = noise_for(tape.request.sampling, self.models.vocabulary) if config.policy.coupled else None
        drafter = self._real(config)
        if config.drafter.kind == "lm":
            return RecordedDrafter(tape, drafter, noise)
        drafter.begin(tape.request, noise)
        return drafter

    def _real(self, config: Config) -> Drafter:
        import torch

        from flowspec.draft.registry import make_drafter

        if self._drafter is None:
            self._drafter = make_drafter(config.drafter, config.folder, Manifest.load(config.stages_path), None, torch.float32, "cpu")
        assert self._drafter is not None
        return self._drafter

    # ---- files -------------------------------------------------------------------------------------
    def save(self, path: Path) -> None:
        """All tapes; `load` refuses them for other models or another coupling."""
        save(path, self.tapes.values(), self._source)

    def load(self, path: Path) -> None:
        tapes, source = load(path)
        need(source == self._source, f"{path} was recorded with {source}; this configuration is {self._source}")
        self.tapes |= {(t.request.prompt, t.request.sampling): t for t in tapes}

    @property
    def _source(self) -> str:
        return f"{self.models.name}, {'' if self.config.policy.coupled else 'not '}coupled"


def made_up(config: Config, profile: Sequence[float], requests: int) -> Forecaster:
    """A forecaster without models: random acceptance. `profile[k]`: how often the target's token is the draft's k-th choice."""
    need(all(p >= 0 for p in profile) and 0 < sum(profile) <= 1, "--synthetic: shares between 0 and 1 that sum up to at most 1")
    scale = config.emulate.hidden_scale
    forecaster = Forecaster(config, Models(name="synthetic", vocabulary=1 << 31, hidden=round(4096 / scale) if scale else 0))
    forecaster.profile = profile
    for k in range(requests):
        sampling = dataclasses.replace(config.sampling, seed=k)
        request = Request(id=k, prompt=tuple(range(64)), sampling=sampling)
        forecaster.add(request, made_up_text(sampling.max_new_tokens))
    return forecaster


def rate(outcomes: Iterable[Outcome]) -> float:
    """Tokens/s of several requests: all tokens over all decode time."""
    outcomes = list(outcomes)
    tokens = sum(len(o.tokens) - 1 for o in outcomes)
    return tokens / max(1e-9, sum(o.last_token - o.first_token for o in outcomes))
