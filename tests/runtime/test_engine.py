"""The engine as a library: cancelling, errors, results."""

import threading

import pytest

import flowspec
from flowspec import Engine, UserError
from flowspec.runtime.worker import Worker


def test_a_generation_can_be_abandoned_and_the_next_one_is_right(pair):
    with Engine.from_config(pair.config(2)) as engine:
        first = engine.generate([5, 6, 7])
        next(first)
        assert [t.id for t in engine.generate([7, 8, 9], max_new_tokens=20)] == pair.greedy(
            [7, 8, 9], 20
        )
        assert first.result.finish_reason == "cancelled" and first.result.new_tokens == 1


def test_the_result_agrees_with_the_tokens(pair):
    with Engine.from_config(pair.config(3)) as engine:
        generation = engine.generate("def add", max_new_tokens=12)
        tokens = list(generation)
        result = generation.result
        assert result.token_ids == [t.id for t in tokens] and result.text == "".join(
            t.text for t in tokens
        )
        assert (
            result.new_tokens == 12 and result.finish_reason == "length" and result.world_size == 4
        )
        assert result.accepted_tokens == sum(t.accepted for t in tokens)
        assert result.tokens_per_second == pytest.approx(11 / result.decode_seconds)
        assert len(result.stage_utilisation) == len(result.stage_peak_mb) == 3


def test_what_was_measured_lasts_from_request_to_request_until_it_is_forgotten(pair):
    def forwards(engine):
        generation = engine.generate([5, 6, 7], method="naive", max_new_tokens=12)
        list(generation)
        costs = generation.result.costs
        return sum(times for _, _, _, times in costs["stages"][1]["forwards"]), sum(
            times for _, _, _, times in costs["draft"]
        )

    with Engine.from_config(pair.config(2)) as engine:
        once, twice = forwards(engine), forwards(engine)
        assert twice[0] > once[0] >= 1 and twice[1] > once[1] >= 1
        engine.forget()
        again = forwards(engine)
        assert again[0] < twice[0] and again[1] < twice[1]


def test_one_token_has_no_rate(pair):
    with Engine.from_config(pair.config(1)) as engine:
        generation = engine.generate([5], max_new_tokens=1)
        assert len(list(generation)) == 1 and generation.result.tokens_per_second is None


def test_the_models_limit_ends_a_text(pair):
    with Engine.from_config(pair.config(2)) as engine:
        prompt = list(range(150))
        generation = engine.generate(prompt, max_new_tokens=50)
        assert len(list(generation)) == 10 and generation.result.finish_reason == "length"


def test_a_seed_that_was_drawn_repeats_the_text(pair):
    with Engine.from_config(pair.config(2)) as engine:
        first = engine.generate([5, 6], temperature=1.0, max_new_tokens=15)
        ids = [t.id for t in first]
        again = engine.generate([5, 6], temperature=1.0, max_new_tokens=15, seed=first.result.seed)
        assert [t.id for t in again] == ids


@pytest.mark.parametrize(
    "prompt,settings,message",
    [
        ([], {}, "the prompt is empty"),
        ([5, 999_999], {}, "holds token .999999."),
        (list(range(160)), {}, "160 tokens; the model takes 160 in all"),
        ([5], {"temperature": -1.0}, "sampling.temperature"),
        ([5], {"method": "fast"}, "method is fast"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_lives_on(pair, prompt, settings, message):
    with Engine.from_config(pair.config(1)) as engine:
        with pytest.raises(UserError, match=message):
            engine.generate(prompt, **settings)
        assert [t.id for t in engine.generate([5], max_new_tokens=5)] == pair.greedy([5], 5)


def test_what_fails_in_a_stage_is_raised_here(pair, monkeypatch):
    def fail(self, message):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Worker, "take", fail)
    engine = Engine.from_config(pair.config(2))
    with pytest.raises(RuntimeError, match="no such luck"):
        list(engine.generate([5, 6, 7]))
    with pytest.raises(RuntimeError, match="no such luck"), engine:
        list(engine.generate([5, 6, 7]))


def test_closing_leaves_no_thread_behind(pair):
    before = threading.active_count()
    engine = Engine.from_config(pair.config(3), ["emulate.link_ms=1"])
    next(engine.generate([5, 6, 7]))
    engine.close()
    engine.close()
    assert threading.active_count() == before


def test_a_list_of_one_device_is_for_all(pair):
    with Engine.from_config(pair.config(2), ["device=[cpu]"]) as engine:
        assert len(list(engine.generate([5], max_new_tokens=3))) == 3


def test_an_engine_is_rank_0_and_the_other_ranks_are_told_what_to_call(pair, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match=r"rank 2 is a stage: call flowspec\.serve there"):
        Engine.from_config(pair.config(2))
    assert callable(flowspec.serve)
