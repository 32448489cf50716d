"""Many requests in one ring: each text is what it is alone, whoever comes and goes, and nobody holds up anybody."""

import asyncio
import gc
import random
import threading
import time

import pytest

from flowspec.core.policies import METHODS
from flowspec.engine import Engine
from flowspec.errors import RankLost, UserError
from flowspec.models.cache import RowCache
from flowspec.runtime.stream import Ended, Stream

SETTINGS = [dict(), dict(temperature=0.8, top_p=0.9, seed=3), dict(temperature=1.2, seed=5)]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def wait_for(what) -> None:
    """Until it is true; the driver's thread does things in its own time."""
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def quiet(engine) -> bool:
    """Nothing of any request is left at rank 0."""
    driver = engine._driver
    return not (driver._live or driver._ending or driver._scheduler.decodings)


def asks(seed: int, n: int):
    """Random requests: prompt, method and settings."""
    r = random.Random(seed)
    for _ in range(n):
        prompt = [r.randrange(5, 300) for _ in range(r.choice([1, 3, 9, 40]))]
        yield prompt, r.choice(METHODS), {**r.choice(SETTINGS), "max_new_tokens": r.randint(1, 24)}


@pytest.mark.parametrize(
    "drafter,stages,overrides",
    [
        ("lm", 3, ["emulate.stage_ms=3"]),
        ("eagle", 2, []),
        slow("lm", 2, ["verify_on=coordinator"]),
        slow("eagle", 3, ["verify_on=coordinator", "emulate.stage_ms=2"]),
        slow("ngram", 1, []),
    ],
)
@pytest.mark.parametrize("seed", [1, slow(2), slow(3)])
def test_each_text_is_what_it_is_alone(pair, drafter, stages, overrides, seed):
    wanted = list(asks(seed, 10))
    config = pair.config(stages, None, drafter)
    with Engine.from_config(config, overrides) as engine:
        alone = [
            [t.id for t in engine.generate(prompt, method=method, **settings)]
            for prompt, method, settings in wanted
        ]
        r, going = random.Random(seed), []
        for prompt, method, settings in wanted:
            going.append(engine.submit(prompt, method=method, **settings))
            time.sleep(r.choice([0.0, 0.0, 0.01]))
        for k in r.sample(range(len(going)), len(going)):
            got = [t.id for t in going[k]]
            assert got == alone[k], f"seed {seed}: {wanted[k][1]} of request {k}"
            assert going[k].result.finish_reason in ("stop", "length")
        assert quiet(engine)


def test_layers_that_a_drafter_reads_come_for_each_request(deep):
    with Engine.from_config(deep.config(2, None, "eagle3")) as engine:
        prompts = [[5 + k, 20, 30 + k] * (k + 1) for k in range(4)]
        alone = [[t.id for t in engine.generate(p, max_new_tokens=16)] for p in prompts]
        going = [engine.submit(p, max_new_tokens=16) for p in prompts]
        assert [[t.id for t in g] for g in going] == alone


def test_a_coroutine_reads_many_at_a_time(pair):
    async def read(generation):
        return [token.id async for token in generation]

    async def all_of(generations):
        return await asyncio.gather(*map(read, generations))

    with Engine.from_config(pair.config(2)) as engine:
        prompts = [[5, 6, k] for k in range(10, 22)]
        got = asyncio.run(all_of([engine.submit(p, max_new_tokens=12) for p in prompts]))
        assert got == [pair.greedy(p, 12) for p in prompts]


def test_a_slow_or_vanished_reader_holds_nobody_up(pair):
    with Engine.from_config(pair.config(2)) as engine:
        slow = engine.submit([5, 6, 7], max_new_tokens=20)
        next(slow)  # and then reads no more for now
        gone = engine.submit([5, 6, 8], max_new_tokens=500, method="ar")
        del gone
        gc.collect()
        assert [t.id for t in engine.submit([9, 9], max_new_tokens=20)] == pair.greedy([9, 9], 20)
        wait_for(lambda: quiet(engine))
        rest = [t.id for t in slow]
        assert slow.token_ids == pair.greedy([5, 6, 7], 20) and slow.token_ids[1:] == rest


def test_what_is_cancelled_frees_its_place_at_once_and_says_what_was_read(pair):
    with Engine.from_config(pair.config(2), ["emulate.stage_ms=4"]) as engine:
        going = [engine.submit([5, k], max_new_tokens=400, method="ar") for k in range(6)]
        kept = engine.submit([8, 8, 8], max_new_tokens=30)
        first = next(going[0])
        for generation in going:
            generation.close()
            assert generation.result.finish_reason == "cancelled"
        assert going[0].result.token_ids == [first.id] and going[1].result.new_tokens == 0
        assert [t.id for t in kept] == pair.greedy([8, 8, 8], 30)
        assert quiet(engine)


def test_requests_may_come_from_many_threads(pair):
    got = {}
    with Engine.from_config(pair.config(2)) as engine:

        def ask(k):
            got[k] = [t.id for t in engine.submit([k, 7, 7], max_new_tokens=10)]

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == {k: pair.greedy([k, 7, 7], 10) for k in range(8)}


def test_what_breaks_the_run_reaches_every_reader_and_every_later_request(pair):
    engine = Engine.from_config(pair.config(2), ["emulate.stage_ms=5"])
    going = [engine.submit([5, k], max_new_tokens=300, method="ar") for k in range(3)]
    next(going[0])
    engine._transport.inbox.fail(RankLost("rank 2 was lost"))
    for generation in going:
        with pytest.raises(RankLost, match="rank 2 was lost"):
            for _ in generation:
                pass
    with pytest.raises(RankLost, match="rank 2 was lost"):
        next(engine.submit([5]))
    engine.close()


def test_requests_that_do_not_fit_together_wait_for_each_other(pair):
    c, prompt = pair.model.config, [5, 6, 7]
    # bytes of a token on one of two stages
    row = 2 * 4 * c.num_key_value_heads * c.head_dim * c.num_hidden_layers // 2
    megabytes = 1.2 * row * RowCache.room(3 + 20 + 40 + 64 + 96) / 1e6
    with Engine.from_config(
        pair.config(2), ["tree.budget=40", f"cache_mb={megabytes}", "emulate.stage_ms=2"]
    ) as engine:
        driver = engine._driver
        going = [engine.submit(prompt, max_new_tokens=20) for _ in range(5)]
        wait_for(lambda: len(driver._live) == 1 and len(driver._waiting) == 4)
        going[3].close()
        assert going[3].result.new_tokens == 0 and going[3].result.finish_reason == "cancelled"
        for k in (4, 0, 1, 2):
            assert [t.id for t in going[k]] == pair.greedy(prompt, 20)
        with pytest.raises(UserError, match=r"need a cache of .* rank 1 has memory for .*cache_mb"):
            engine.submit(prompt, max_new_tokens=157)
        assert [t.id for t in engine.submit(prompt, max_new_tokens=20)] == pair.greedy(prompt, 20)


@pytest.mark.slow
def test_memory_is_back_where_it_was_after_many_requests(pair):
    """Of what the ranks hold for requests, nothing is left; what is learnt of the ring has its own bounds."""
    with Engine.from_config(pair.config(2)) as engine:
        held = []
        for _ in range(4):
            for _ in range(5):
                going = [engine.submit(p, method=m, **s) for p, m, s in asks(7, 10)]
                for generation in going:
                    for _ in generation:
                        pass
            gc.collect()
            held.append(
                sum(1 for o in gc.get_objects() if str(type(o).__module__).startswith("flowspec"))
            )
        assert quiet(engine) and max(held[1:]) - held[1] < 50, held


def test_a_stream_gives_what_was_put_in_and_then_its_end():
    stream = Stream()
    stream.put(1, 2)
    stream.end()
    stream.end(ValueError("too late"))
    assert [stream.get(), stream.get()] == [1, 2]
    with pytest.raises(Ended):
        stream.get()
