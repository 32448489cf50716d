"""What the server writes is what the engine writes, by whichever interface and client it is asked."""

import json

import pytest

PROMPT = "def add(a, b):"
LOOP = "import os\n\n\ndef read_lines(path):"
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "for i in"}]


def text_of(served, prompt, **options) -> str:
    generation = served.engine.submit(prompt, **options)
    for _ in generation:
        pass
    return generation.result.text


def events_of(response) -> list[dict]:
    return [
        json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")
    ]


@pytest.mark.parametrize("prompt", [PROMPT, [512, 70, 9]], ids=["text", "tokens"])
def test_greedy_completions_are_the_engines(served, prompt):
    made = served.client.completions.create(model="tiny", prompt=prompt, max_tokens=30)
    assert made.choices[0].text == text_of(served, prompt, max_new_tokens=30) != ""
    assert made.choices[0].finish_reason == "length" and made.model == "tiny"
    assert made.usage.completion_tokens == 30
    length = len(served.engine.text.encode(prompt)) if isinstance(prompt, str) else 3
    assert made.usage.prompt_tokens == length and made.usage.total_tokens == length + 30


def test_usage_tells_drafted_tokens(served):
    generation = served.engine.submit(LOOP, max_new_tokens=40)
    accepted = sum(token.accepted for token in generation)
    usage = served.client.completions.create(model="tiny", prompt=LOOP, max_tokens=40).usage
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens == accepted > 0 < details.rejected_prediction_tokens


def test_a_stream_is_the_same_text_and_ends_with_usage(served):
    *chunks, last = served.client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(
        served, PROMPT, max_new_tokens=30
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert last.choices == [] and last.usage.completion_tokens == 30
    assert all(chunk.usage is None for chunk in chunks)
    raw = served.http.post(
        "/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, "stream": True}
    )
    assert raw.text.endswith("data: [DONE]\n\n") and "usage" not in raw.text


def test_chat_is_the_engines_answer(served):
    text = served.engine.text
    expected = text_of(served, text.encode_chat(TURNS), max_new_tokens=20, stop=text.chat_stops)
    made = served.client.chat.completions.create(model="tiny", messages=TURNS, max_tokens=20)
    assert (
        made.choices[0].message.content == expected and made.choices[0].message.role == "assistant"
    )
    parts = [
        {"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in TURNS
    ]
    chunks = served.client.chat.completions.create(
        model="tiny", messages=parts, max_completion_tokens=20, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_inside_an_accepted_path_ends_the_text(served, stream):
    """The draft had the stop text and what follows it on the way already."""
    tokens = [*served.engine.submit(LOOP, max_new_tokens=40)]
    at = next(
        k for k in range(4, 38)
        if all(token.accepted and token.text for token in tokens[k : k + 3])
        and tokens[k].text + tokens[k + 1].text not in "".join(t.text for t in tokens[: k + 1])
    )  # fmt: skip
    before, stop = "".join(t.text for t in tokens[:at]), tokens[at].text + tokens[at + 1].text
    made = served.client.completions.create(
        model="tiny", prompt=LOOP, max_tokens=40, stop=["never", stop], stream=stream
    )
    choices = [chunk.choices[0] for chunk in (made if stream else [made])]
    assert "".join(choice.text for choice in choices) == before
    assert choices[-1].finish_reason == "stop"


def test_seeds_are_the_engines_and_n_counts_them_up(served):
    options = {"temperature": 1.0, "top_p": 0.9}
    wanted = [
        text_of(served, PROMPT, max_new_tokens=25, seed=seed, **options) for seed in (7, 8, 9)
    ]
    assert len({*wanted}) == 3
    more = {"top_k": 0, "min_p": 0.0}
    made = served.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=25, seed=7, n=3, **options, extra_body=more
    )
    assert [choice.text for choice in made.choices] == wanted
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert made.usage.completion_tokens == 75
    streamed = ["", "", ""]
    for chunk in served.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=25, seed=7, n=3, stream=True, **options
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == wanted


@pytest.mark.slow
def test_several_prompts_are_several_choices(served):
    made = served.client.completions.create(
        model="tiny", prompt=[PROMPT, "for i"], max_tokens=9, n=2
    )
    wanted = [
        text_of(served, prompt, max_new_tokens=9) for prompt in (PROMPT, PROMPT, "for i", "for i")
    ]
    assert [choice.text for choice in made.choices] == wanted


def test_responses_are_an_adapter(served):
    text = served.engine.text
    tokens = text.encode_chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "for"}]
    )
    wanted = text_of(served, tokens, max_new_tokens=12, stop=text.chat_stops)
    asked = dict(model="tiny", input="for", instructions="Be brief.", max_output_tokens=12)
    made = served.client.responses.create(**asked)
    assert made.output_text == wanted and made.status == "incomplete"
    assert made.incomplete_details.reason == "max_output_tokens" and made.usage.output_tokens == 12
    events = [*served.client.responses.create(**asked, stream=True)]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == wanted
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    assert [e.sequence_number for e in events] == [*range(len(events))]
    assert events[-1].response.output_text == wanted


def test_messages_are_an_adapter(served):
    text = served.engine.text
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "for"}]
    wanted = text_of(served, text.encode_chat(turns), max_new_tokens=12, stop=text.chat_stops)
    asked = {
        "max_tokens": 12,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "for"}]}],
    }
    made = served.http.post("/v1/messages", json=asked).json()
    assert (
        made["content"] == [{"type": "text", "text": wanted}]
        and made["stop_reason"] == "max_tokens"
    )
    assert made["usage"]["output_tokens"] == 12
    events = events_of(served.http.post("/v1/messages", json=asked | {"stream": True}))
    assert (
        "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta") == wanted
    )
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    stop = wanted[4:7]
    made = served.http.post("/v1/messages", json=asked | {"stop_sequences": [stop]}).json()
    assert (made["stop_reason"], made["stop_sequence"]) == ("stop_sequence", stop)
    assert made["content"][0]["text"] == wanted[: wanted.index(stop)]
    error = served.http.post("/v1/messages", json={"messages": []})
    assert error.status_code == 400 and error.json()["type"] == "error"


def test_facts(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").id == "tiny"
    assert served.http.get("/health").json() == {"status": "ok"}
    assert set(served.http.get("/version").json()) == {"version"}
    paths = served.http.get("/openapi.json").json()["paths"]
    assert {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
    } <= paths.keys()
