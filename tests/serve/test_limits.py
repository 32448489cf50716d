"""What the server refuses, and what becomes of clients that leave and of a ring that breaks."""

import asyncio
import json
import random
import re
import socket
import string
from collections import Counter

import pytest

from flowspec import RankLost
from tests.serve.serving import PATIENCE, openai, serving, wait_until

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]


# ---- what is asked for ---------------------------------------------------------------------------
BAD = [
    *((COMPLETION, {"prompt": "x", name: value}, name) for name, value in [
        ("temperature", -0.1), ("temperature", "hot"), ("temperature", True), ("top_p", 0), ("top_p", 1.5), ("top_k", -1),
        ("top_k", 2.5), ("min_p", 2), ("seed", -1), ("seed", 2**64), ("max_tokens", 0), ("max_tokens", 10**6), ("n", 0), ("n", 129),
        ("stop", ""), ("stop", ["a"] * 17), ("stop", [1]), ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0),
        ("logit_bias", {"x": 1}), ("logit_bias", {"1": 101}), ("logprobs", 21), ("echo", True), ("best_of", 2), ("suffix", "y"),
        ("stream", "yes"), ("stream_options", {"include_usage": True}), ("ignore_eos", True), ("guided_json", {}), ("model", 3),
    ]),
    (COMPLETION, {}, "prompt"),
    (COMPLETION, {"prompt": ""}, "prompt"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": [[5], ["a"]]}, "prompt"),
    (COMPLETION, {"prompt": [10**9]}, "prompt"),
    (COMPLETION, {"prompt": "word " * 3000}, "prompt"),
    (COMPLETION, {"prompt": "x", "stream": True, "stream_options": {"more": 1}}, "stream_options"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
    (CHAT, {"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": USER, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
    ("/v1/responses", {"input": "x", "previous_response_id": "r"}, "previous_response_id"),
    ("/v1/responses", {"input": "x", "max_output_tokens": 10**6}, "max_output_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(
    "path,body,param", BAD, ids=[f"{k}-{p}" for k, (_, _, p) in enumerate(BAD)]
)
def test_what_is_wrong_is_named(served, path, body, param):
    answer = served.http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert error["type"] == "invalid_request_error" and param.split("_")[0] in error["message"]
    assert served.idle()


def test_what_asks_for_nothing_is_taken(served):
    body = {
        "prompt": "x",
        "max_tokens": 1,
        "user": "me",
        "logprobs": None,
        "echo": False,
        "best_of": 1,
        "suffix": None,
    }
    body |= {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "stop": None,
    }
    assert served.http.post(COMPLETION, json=body).status_code == 200


def test_another_model_is_not_found(served):
    with pytest.raises(openai.NotFoundError, match="tiny"):
        served.client.completions.create(model="gpt-4", prompt="x")
    assert served.http.get("/v1/models/gpt-4").status_code == 404
    assert served.http.get("/nowhere").json()["error"]["type"] == "not_found_error"


def garbage(rng: random.Random) -> bytes:
    """A body that is wrong in some way, or perhaps right."""
    value = rng.choice([
        lambda: rng.randbytes(rng.randint(0, 40)),
        lambda: b"[" * rng.randint(1, 20000),
        lambda: b'{"a":' * rng.randint(1, 5000),
        lambda: json.dumps({rng.choice(string.ascii_letters): rng.random()}).encode(),
        lambda: b'{"prompt": "\\ud800", "max_tokens": 1}',
        lambda: b'{"prompt": "\xff"}',
        lambda: b'{"\\udc80": 1, "prompt": "x", "stop": "\\ud800", "max_tokens": 1}',
        lambda: b'{"prompt": "x", "model": "\\udc80"}',
        lambda: b'{"prompt": "x", "temperature": ' + rng.choice([b"NaN", b"1e999", b"-Infinity", b"9" * 5000]) + b"}",
        lambda: b'{"prompt": "x", "seed": ' + b"9" * rng.randint(18, 30) + b', "max_tokens": 1}',
        lambda: json.dumps({"prompt": rng.choices([-1, 0, 5, 2**31, 2**70, None, "a", 1.5], k=3), "max_tokens": 1}).encode(),
        lambda: json.dumps({"messages": [{"role": rng.choice(["user", 1]), "content": rng.choice(["x", None, 7, [], {}])}]}).encode(),
        lambda: json.dumps({"prompt": "x", "max_tokens": 1, "stop": rng.choice([[[]], {}, 0, ["\x00"], ["é" * 1001]])}).encode(),
    ])()  # fmt: skip
    if value and rng.random() < 0.3:
        at = rng.randrange(len(value))
        value = value[:at] + rng.randbytes(1) + value[at + rng.randint(0, 2) :]
    return value


@pytest.mark.slow
def test_garbage_is_refused_and_nothing_of_it_stays(served):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(300):
        path = rng.choice([COMPLETION, CHAT, "/v1/responses", "/v1/messages"])
        body, kind = garbage(rng), rng.choice(["application/json"] * 9 + ["text/plain"])
        answer = served.http.post(path, content=body, headers={"Content-Type": kind})
        assert answer.status_code in (200, 400, 404), (answer.status_code, path, body[:200])
        assert answer.json()
    wait_until(served.idle)
    assert served.http.post(COMPLETION, json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_body_that_is_too_large_is_refused(served):
    with serving(served.engine, most_bytes=1000) as small:
        assert small.http.post(COMPLETION, json={"prompt": "x" * 2000}).status_code == 413
        pieces = (b"x" * 400 for _ in range(4))  # its size is not said beforehand
        headers = {"Content-Type": "application/json"}
        assert small.http.post(COMPLETION, content=pieces, headers=headers).status_code == 413
        assert small.http.post(COMPLETION, json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_the_key_is_asked_for_everywhere_but_at_health(served):
    with serving(served.engine, key="sésame") as locked:
        assert locked.http.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json"):
            assert locked.http.get(path).status_code == 401
        for shown in ("Bearer sesame", "Bearer", "Basic sésame", "sésame"):
            headers = {"Authorization": shown.encode()}
            assert locked.http.get("/v1/models", headers=headers).status_code == 401
        for headers in (
            {"Authorization": "Bearer sésame".encode()},
            {"x-api-key": "sésame".encode()},
        ):
            assert locked.http.get("/v1/models", headers=headers).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            locked.client.with_options(api_key="wrong").models.list()


# ---- ids, logs, metrics --------------------------------------------------------------------------
def test_each_request_has_an_id_and_a_line_in_the_log(served, capsys):
    with serving(served.engine, log=True) as logged:
        body = {"prompt": "def", "max_tokens": 5}
        answer = logged.http.post(COMPLETION, json=body, headers={"X-Request-Id": "mine-1"})
        other = logged.http.post(
            COMPLETION, json={"prompt": "x"} | {"n": -1}, headers={"X-Request-Id": "bad id"}
        )
    assert answer.headers["x-request-id"] == "mine-1" and answer.json()["id"] == "cmpl-mine-1"
    assert re.fullmatch("[0-9a-f]{32}", other.headers["x-request-id"])
    one, two = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (one["id"], one["status"], one["path"], one["completion"]) == (
        "mine-1",
        200,
        COMPLETION,
        5,
    )
    assert (two["id"], two["status"]) == (other.headers["x-request-id"], 400)


SAMPLE = re.compile(r'([a-z_:2]+)\{model_name="tiny"(?:,[a-z_]+="[^"]+")?\} (\S+)')


@pytest.mark.parametrize("compat", [None, "vllm"])
def test_metrics_are_counted(served, compat):
    with serving(served.engine, compat=compat) as counted:
        before = counted.http.get("/metrics").text
        for _ in range(2):
            usage = counted.client.completions.create(
                model="tiny", prompt="import os\n", max_tokens=20
            ).usage
        found: dict[str, float] = {}
        for line in counted.http.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, value = SAMPLE.fullmatch(line).groups()
                found[name] = found.get(name, 0) + float(value)
    ours, theirs = "flowspec_", "vllm:"
    assert ("flowspec_requests_total" in before) == (compat is None)
    names = {
        "requests_total": "request_success_total",
        "generated_tokens_total": "generation_tokens_total",
        "accepted_tokens_total": "spec_decode_num_accepted_tokens_total",
        "accepted_tokens_per_position_total": "spec_decode_num_accepted_tokens_per_pos_total",
        "draft_tokens_total": "spec_decode_num_draft_tokens_total",
        "drafts_total": "spec_decode_num_drafts_total",
        "request_seconds_count": "e2e_request_latency_seconds_count",
        "inter_token_seconds_count": "inter_token_latency_seconds_count",
    }
    got = {name: found[theirs + other if compat else ours + name] for name, other in names.items()}
    accepted = 2 * usage.completion_tokens_details.accepted_prediction_tokens
    rejected = 2 * usage.completion_tokens_details.rejected_prediction_tokens
    assert accepted > 0 and got == {
        "requests_total": 2,
        "generated_tokens_total": 40,
        "accepted_tokens_total": accepted,
        "accepted_tokens_per_position_total": accepted,
        "draft_tokens_total": accepted + rejected,
        "drafts_total": 40 - accepted,
        "request_seconds_count": 2,
        "inter_token_seconds_count": 38,
    }


def test_accepted_tokens_are_counted_by_their_place_in_a_run(served):
    place, places = 0, Counter()
    for token in served.engine.submit("import os\n", max_new_tokens=30):
        places[str(place)] += token.accepted
        place = place + 1 if token.accepted else 0
    with serving(served.engine) as counted:
        counted.http.post(COMPLETION, json={"prompt": "import os\n", "max_tokens": 30})
        name = "accepted_tokens_per_position_total"
        assert places["1"] > 0
        assert {at: counted.counted(name, at) for at in places} == places


# ---- many, slow and leaving clients --------------------------------------------------------------
LONG = {"prompt": [5], "max_tokens": 150}


def raw(served, body: dict) -> socket.socket:
    """A connection over which this was asked."""
    data = json.dumps(body).encode()
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    made = socket.create_connection(("127.0.0.1", served.server.port), PATIENCE)
    made.sendall(head.encode() + data)
    return made


def heard(connection: socket.socket, end: bytes) -> bytes:
    """What came over a connection up to these bytes, or its end."""
    text = b""
    while end not in text and (piece := connection.recv(1 << 16)):
        text += piece
    return text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_rows(slow, stream):
    made, ended = (
        slow.counted("generated_tokens_total"),
        slow.counted("requests_total", "cancelled"),
    )
    connection = raw(slow, {**LONG, "stream": stream})
    wait_until(lambda: slow.engine.load.running == 1)
    if stream:
        assert b"data: " in heard(connection, b"data: ")
    connection.close()
    wait_until(slow.idle)
    assert slow.counted("requests_total", "cancelled") == ended + 1
    assert slow.counted("generated_tokens_total") - made < 140


@pytest.mark.slow
def test_a_stream_can_be_closed(slow):
    stream = slow.client.completions.create(model="tiny", stream=True, n=2, **LONG)
    next(iter(stream))
    assert slow.engine.load.running == 2
    stream.close()
    wait_until(slow.idle)


def test_beyond_the_limit_clients_are_told_to_come_again(slow):
    two = raw(slow, {**LONG, "n": 2})
    wait_until(lambda: slow.engine.load.running == 2)
    answer = slow.http.post(COMPLETION, json={"prompt": "x", "max_tokens": 1})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"
    two.close()
    wait_until(slow.idle)
    assert slow.http.post(COMPLETION, json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert slow.http.post(COMPLETION, json={"prompt": "x", "n": 3}).json()["error"]["param"] == "n"


@pytest.mark.slow
def test_who_reads_nothing_holds_nobody_up(slow):
    deaf = raw(slow, {**LONG, "max_tokens": 20, "stream": True})
    other = slow.http.post(COMPLETION, json={"prompt": [6], "max_tokens": 10})
    assert other.status_code == 200
    wait_until(slow.idle)  # its text is made, and its place free, though nobody has read it
    assert b"data: [DONE]" in heard(deaf, b"[DONE]")
    deaf.close()


def test_who_takes_nothing_for_long_is_let_go(monkeypatch):
    from flowspec.http import guard

    monkeypatch.setattr(guard, "STALLED", 0.05)
    told, lines = [], []

    async def app(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        except TimeoutError:
            told.append("stalled")
            raise

    async def never(message):
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(guard.Guard(app, None, 100, lines.append)(scope, None, never))
    assert told == ["stalled"] and len(lines) == 1


# ---- a ring that breaks --------------------------------------------------------------------------
def test_a_lost_rank_ends_all_that_is_open_with_its_name(fragile):
    stream = fragile.client.completions.create(model="tiny", stream=True, **LONG)
    next(iter(stream))
    whole = raw(fragile, LONG)
    wait_until(lambda: fragile.engine.load.running == 2)
    fragile.break_it()
    with pytest.raises(openai.APIError, match=r"rank 1 \(stage 1\) died: a test"):
        for _ in stream:
            pass
    assert heard(whole, b"died: a test").startswith(b"HTTP/1.1 503 ")
    whole.close()
    health = fragile.http.get("/health")
    assert health.status_code == 503 and "rank 1 (stage 1) died" in health.text
    assert fragile.http.post(COMPLETION, json={"prompt": "x"}).status_code == 503
    with pytest.raises(RankLost, match="rank 1"):
        fragile.server.wait(fragile.engine)
    assert fragile.calls.taken == 0 and not fragile.calls.open


@pytest.mark.slow
def test_an_idle_ring_that_breaks_ends_the_server(fragile):
    fragile.http.post(COMPLETION, json={"prompt": "x", "max_tokens": 1})
    fragile.break_it()
    with pytest.raises(RankLost, match="rank 1"):
        fragile.server.wait(fragile.engine)


def test_until_all_is_loaded_there_is_no_health(served):
    with serving(served.engine) as early:
        early.calls.why_not = "the model is being loaded"
        assert early.http.get("/health").status_code == 503
        refused = early.http.post(COMPLETION, json={"prompt": "x"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        early.calls.attach(served.engine)
        assert early.http.get("/health").status_code == 200
