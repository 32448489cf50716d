"""Ranks that draft for rank 0: the text is that of plain decoding, also once they are lost."""

import random

import pytest

from flowspec import UserError
from flowspec.config import load_config
from flowspec.engine import Engine
from flowspec.preflight import check_run
from tests.runtime.test_identity import METHODS, PROMPTS, SAMPLED, assert_same, slow, text


def lm(pair, ranks: int) -> str:
    return f"{{kind: lm, path: {pair.draft}, ranks: {ranks}}}"


@pytest.mark.parametrize(
    "stages,words",
    [
        (1, ["drafter={0}"]),
        slow(2, ["drafter=[{0}, {{kind: ngram}}]", "dsi.servers=2"]),
        slow(2, ["drafter=[{1}, {0}]", "verify_on=coordinator"]),
    ],
)
def test_every_method_writes_the_text_of_plain_decoding(pair, stages, words):
    words = [word.format(lm(pair, 2), lm(pair, 1)) for word in words]
    with Engine.from_config(pair.config(stages), words) as engine:
        want = pair.greedy(PROMPTS[1], 24)
        for method in METHODS:
            assert_same(text(engine, PROMPTS[1], method=method, max_new_tokens=24), want)
        text(engine, PROMPTS[1], method="serial", max_new_tokens=24)
        assert engine._last.result.accepted_tokens > 0
        for settings in SAMPLED:
            settings = settings | {"max_new_tokens": 24}
            want = text(engine, PROMPTS[1], method="ar", **settings)
            for method in ("serial", "flowspec", "naive"):
                assert_same(text(engine, PROMPTS[1], method=method, **settings), want)


def test_it_drafts_what_one_drafter_on_rank_0_does(pair):
    """`serial` waits for the whole tree, so what is accepted depends on the drafts alone."""
    found = []
    for drafter in (lm(pair, 0), lm(pair, 3)):
        with Engine.from_config(pair.config(1), [f"drafter={drafter}"]) as engine:
            asks = [(PROMPTS[k], sampling) for k in (1, 2) for sampling in ({}, SAMPLED[0])]
            found.append([])
            for prompt, settings in asks:
                text(engine, prompt, method="serial", max_new_tokens=24, **settings)
                found[-1].append(engine._last.result.accepted_tokens)
    assert found[0] == found[1] and min(found[0]) > 0


def test_several_requests_share_a_pool_and_leave_nothing_there(pair):
    with Engine.from_config(pair.config(2), [f"drafter={lm(pair, 2)}"]) as engine:
        running = [engine.submit(PROMPTS[k], max_new_tokens=20) for k in range(3)]
        running.append(engine.submit(PROMPTS[0], max_new_tokens=500))
        for k, generation in enumerate(running[:3]):
            assert [t.id for t in generation] == pair.greedy(PROMPTS[k], 20)
        running[3].close()
        text(engine, PROMPTS[1], max_new_tokens=4)
        [pool] = {*engine._driver._pools.values()}
    assert not pool.shares._trees


@pytest.mark.parametrize("method", ["serial", "flowspec"])
def test_a_lost_rank_is_done_without_and_the_last_one_ends_in_plain_decoding(
    pair, method, monkeypatch, capsys
):
    """Lost is who does not hear what it is asked for."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    left = {rank: draw.randrange(1, 8) for rank in (2, 3)}  # so many asks are answered
    with Engine.from_config(pair.config(1), [f"drafter={lm(pair, 2)}"]) as engine:
        say = engine._transport.send_control

        def send_control(to, message):
            if message.kind == "ask":
                left[to] -= 1
                if left[to] == 0:
                    for _ in range(2):  # as two links would say
                        engine._driver.lost(to, f"rank {to} is gone")
            if left.get(to, 1) > 0 or message.kind == "stop":
                say(to, message)

        monkeypatch.setattr(engine._transport, "send_control", send_control)
        for prompt in PROMPTS * 2:
            got = text(engine, prompt, method=method, max_new_tokens=40)
            assert got == pair.greedy(prompt, 40)
        assert engine._last.result.drafted_tokens == 0
    said = capsys.readouterr().err
    for rank in left:
        assert said.count(f"rank {rank} is gone; the run goes on without it") == 1


def test_each_rank_needs_the_files_of_its_own_drafter_alone(pair):
    """The other hosts of a run may not have them."""
    words = [f"drafter=[{{kind: ngram}}, {lm(pair, 1)}, {{kind: lm, path: elsewhere, ranks: 1}}]"]
    config = load_config(pair.config(1), words)
    for rank in range(3):
        assert check_run(config, [rank]).topology.world_size == 4
    with pytest.raises(UserError, match=r"drafter\.2\.path"):
        check_run(config, [3])


def test_what_is_wrong_is_said_by_its_key(pair):
    for words, line in (
        (["drafter={kind: ngram, ranks: 1}"], "drafter.ranks is 1: a drafter of kind ngram drafts"),
        ([f"drafter={{kind: lm, path: {pair.draft}, ranks: -1}}"], "drafter.ranks is -1: it must"),
        (["drafter=[{kind: ngram}, {kind: lm, path: x, ranks: a}]"], r"drafter.1.ranks"),
    ):
        with pytest.raises(UserError, match=line):
            load_config(pair.config(1), words)
