"""Parameters that change or tell the target's choices arrive at the engine, and what it tells comes back."""

import pytest

PROMPT = "import os\n\n\ndef read_lines(path):"


def tokens_of(served, **options):
    return [*served.engine.submit(PROMPT, **options)]


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.3},
        {"logit_bias": {"10": 50.0}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_adjusted_texts_are_the_engines(served, options):
    own = {
        k: {int(t): b for t, b in v.items()} if k == "logit_bias" else v for k, v in options.items()
    }
    wanted = "".join(token.text for token in tokens_of(served, max_new_tokens=20, **own))
    plain = "".join(token.text for token in tokens_of(served, max_new_tokens=20))
    body = {"prompt": PROMPT, "max_tokens": 20, **options}
    made = served.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert made == wanted != plain


def test_logprobs_are_the_targets(served):
    wanted = tokens_of(served, max_new_tokens=12, logprobs=3)
    made = served.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, logprobs=3)
    told = made.choices[0].logprobs
    assert told.token_logprobs == pytest.approx([token.logprob for token in wanted])
    assert [len(top) for top in told.top_logprobs] == [3] * 12
    assert "".join(told.tokens) == made.choices[0].text
    places = zip(told.text_offset, told.tokens, strict=True)
    assert all(made.choices[0].text[at:].startswith(text) for at, text in places)
    turns = [{"role": "user", "content": "for i in"}]
    asked = dict(model="tiny", messages=turns, max_tokens=9, logprobs=True, top_logprobs=2)
    whole = served.client.chat.completions.create(**asked).choices[0]
    streamed = [c.choices[0] for c in served.client.chat.completions.create(**asked, stream=True)]
    content = [each for choice in streamed if choice.logprobs for each in choice.logprobs.content]
    assert content == whole.logprobs.content and len(content) == 9
    assert all(
        len(each.top_logprobs) == 2 and each.bytes == [*each.token.encode()] for each in content
    )


def test_a_bias_of_no_token_is_named(served):
    body = {"prompt": "x", "max_tokens": 1, "logit_bias": {"99999999": 1}}
    error = served.http.post("/v1/completions", json=body).json()["error"]
    assert error["param"] == "logit_bias" and "vocabulary" in error["message"]
