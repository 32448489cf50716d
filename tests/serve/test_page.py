"""The page for people, in a real browser, and what it is told of the ring."""

import asyncio
import json
import re

import pytest

from flowspec import Engine
from flowspec.http import page as files
from flowspec.http import pipeline
from flowspec.http.refusal import Refusal
from tests.serve import browser as chromium
from tests.serve.serving import serving, wait_until

PROMPT = "import os\n\n\ndef read_lines(path):"


# ---- its files, and what may be asked of them ----------------------------------------------------
def test_the_files_are_served_without_a_key_and_may_load_nothing_from_elsewhere(served):
    with serving(served.engine, key="secret") as locked:
        for path, (name, kind) in files.FILES.items():
            answer = locked.http.get(path)
            assert answer.status_code == 200 and answer.headers["content-type"] == kind
            assert answer.content == (files.FOLDER / name).read_bytes()
            policy = answer.headers["content-security-policy"]
            assert (
                "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            )
            assert not re.search(r"https?://(?!www\.w3\.org/)", answer.text)
        assert {path.name for path in files.FOLDER.iterdir()} == {
            name for name, _ in files.FILES.values()
        }
        assert locked.http.get("/pipeline").status_code == 401
        assert locked.http.get("/assets/page.html").status_code == 401
    paths = served.http.get("/openapi.json").json()["paths"]
    assert "/pipeline" not in paths and "/" not in paths


def test_a_stream_tells_origins_only_if_it_is_asked_for_them(served):
    body = {"prompt": PROMPT, "max_tokens": 40, "stream": True}
    plain = served.http.post("/v1/completions", json=body).text
    assert "origins" not in plain
    told = served.http.post(
        "/v1/completions", json=body | {"stream_options": {"include_origins": True}}
    )
    choices = [
        json.loads(line[6:])["choices"][0]
        for line in told.text.splitlines()
        if line.startswith("data: {")
    ]
    tokens = [token for choice in choices for token in choice["origins"]]
    assert all(
        choice["text"] == "".join(text for text, _ in choice["origins"]) for choice in choices
    )
    assert [*map(tuple, tokens)] == [
        (t.text, t.accepted) for t in served.engine.submit(PROMPT, max_new_tokens=40)
    ]
    assert {accepted for _, accepted in tokens} == {True, False}


# ---- what watchers hear --------------------------------------------------------------------------
async def heard(events) -> dict:
    """The next snapshot that a watcher is told."""
    return json.loads((await anext(events))[6:])


def test_all_watchers_share_a_snapshot_and_none_is_made_for_nobody(served):
    async def watch():
        shared = pipeline.Pipeline(served.calls)
        watchers = [shared.enter(None) for _ in range(3)]
        events = [shared.events(watcher) for watcher in watchers]
        found = await asyncio.gather(*(anext(each) for each in events))
        assert len(set(found)) == 1 and shared.looks == 1
        for text in served.engine.submit(PROMPT, max_new_tokens=150):
            assert text  # nobody takes the next snapshot meanwhile
        late = await heard(events[0])
        assert shared.looks == 2 and late["running"] == 0 and late["plain_ms"] > 0
        assert [stage["name"] for stage in late["stages"]] == ["stage 1", "stage 2"]
        assert all(0 < stage["busy"] <= 1 and stage["forward_ms"] > 0 for stage in late["stages"])
        for watcher in watchers:
            shared.leave(watcher)
        assert not shared.watchers

    asyncio.run(watch())


def test_so_many_may_watch_and_no_more(served, monkeypatch):
    monkeypatch.setattr(pipeline, "MOST", 1)
    shared = pipeline.Pipeline(served.calls)
    first = shared.enter(None)
    with pytest.raises(Refusal, match="1 watch already"):
        shared.enter(None)
    shared.leave(first)
    shared.leave(shared.enter(None))


def test_a_broken_ring_makes_no_snapshot_and_ends_the_watchers(fragile):
    fragile.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})

    async def watch():
        shared = pipeline.Pipeline(fragile.calls)
        events = shared.events(shared.enter(None))
        assert (await heard(events))["running"] == 0
        fragile.break_it()
        wait_until(lambda: fragile.engine.error)
        fragile.calls.fail("rank 1 died")
        assert [event async for event in events] == []

    asyncio.run(watch())


@pytest.fixture(scope="module")
def drafting(demo):
    """One that drafts on and on, slowly enough to be watched."""
    options = ["method=flowspec", "emulate.stage_ms=25", "sampling.max_new_tokens=48"]
    with Engine.from_config(demo, options) as engine, serving(engine) as served:
        yield served


def test_a_tree_is_told_to_who_names_its_request(drafting):
    body = {"prompt": PROMPT, "stream": True, "max_tokens": 150}
    with drafting.http.stream(
        "POST", "/v1/completions", json=body, headers={"X-Request-Id": "mine"}
    ) as text:
        assert text.status_code == 200, text.read()
        lines = text.iter_lines()  # dropped, it would close the stream
        next(lines)
        for request in ("other", "mine"):
            with drafting.http.stream("GET", "/pipeline", params={"request": request}) as told:
                seen = (
                    json.loads(line[6:]) for line in told.iter_lines() if line.startswith("data: ")
                )
                event = next(event for event in seen if event["tree"] or request == "other")
                assert event["running"] == 1 and bool(event["tree"]) == (request == "mine")
    assert event["tree"]["nodes"] and event["tree"]["drafted"] >= event["tree"]["sent"] > 0
    wait_until(drafting.idle)


# ---- in a browser --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    made = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


WATCH_TREE = """
window.met = {nodes: 0, gone: 0, kinds: []};
new MutationObserver((changes) => {
  for (const change of changes) {
    for (const node of change.removedNodes) if (node.classList?.contains("node")) met.gone += 1;
    if (change.type === "attributes") met.kinds = [...new Set([...met.kinds, change.target.getAttribute("class")])];
  }
  met.nodes = Math.max(met.nodes, document.querySelectorAll("#tree .node").length);
}).observe(document.getElementById("tree"), {childList: true, subtree: true, attributes: true, attributeFilter: ["class"]});
"""
READY = "document.getElementById('status').textContent === 'ready'"
ENDED = "/^[0-9]+ tokens/.test(document.getElementById('status').textContent)"
FOCUSED = "document.activeElement.id || document.activeElement.value"


@pytest.mark.slow
def test_a_text_is_asked_for_by_keyboard_and_its_tokens_and_tree_are_shown(drafting, browser):
    page = browser.page(drafting.url)
    page.wait(READY)
    page.value(WATCH_TREE)
    assert page.value(FOCUSED) == "prompt"
    page.press("Tab", "Tab")
    assert page.value(FOCUSED) == "most"
    page.type("40")
    page.press("Tab", "Tab")
    assert page.value(FOCUSED) == "send"
    page.value("document.getElementById('prompt').focus()")
    page.type(PROMPT)
    page.press("Enter")
    page.wait(ENDED)
    spans = page.value(
        "[...document.querySelectorAll('.turn.answer span')].map((s) => [s.className, s.textContent])"
    )
    made = drafting.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40)
    assert "".join(text for _, text in spans) == made.choices[0].text
    assert {kind for kind, _ in spans} == {"accepted", "own"}
    accepted = sum(kind == "accepted" for kind, _ in spans)
    assert page.value("document.getElementById('share').textContent") == f"{accepted} of 40"
    page.wait("document.querySelectorAll('#tree .node').length === 0")
    met = page.value("met")
    assert met["nodes"] > 2 and met["gone"] >= met["nodes"]
    assert {"node root", "node sent", "node dead", "node text"} <= {*met["kinds"]}
    assert re.fullmatch(
        r"\d+\.\d tok/s", page.value("document.getElementById('plain').textContent")
    )
    assert page.value("document.querySelectorAll('#stages tr').length") == 2
    assert page.errors == []
    assert page.asked and all(url.startswith(drafting.url) for url in page.asked)


@pytest.mark.slow
def test_escape_stops_a_text_and_frees_its_rows(drafting, browser):
    page = browser.page(drafting.url)
    page.wait(READY)
    page.value("document.getElementById('most').value = 400")
    page.type(PROMPT)
    page.press("Enter")
    page.wait("document.querySelectorAll('.turn.answer span').length")
    page.press("Escape")
    page.wait("document.getElementById('status').textContent === 'stopped'")
    wait_until(drafting.idle)
    assert page.errors == []


@pytest.mark.slow
def test_a_conversation_is_sent_as_one(drafting, browser):
    page = browser.page(drafting.url)
    page.wait(READY)
    assert (
        page.value("document.querySelector('[name=mode]:checked').value") == "completion"
    )  # no template
    page.value("document.querySelector('[name=mode]:checked').focus()")
    page.press("ArrowDown")
    assert page.value("document.querySelector('[name=mode]:checked').value") == "chat"
    page.value("document.getElementById('most').value = 5")
    answers = []
    for number in (1, 2):
        page.value("document.getElementById('prompt').focus()")
        page.type("for i in")
        page.press("Enter")
        page.wait(
            f"!document.getElementById('send').disabled && document.querySelectorAll('.turn.answer').length === {number}"
        )
        answers.append(
            page.value("[...document.querySelectorAll('.turn.answer')].at(-1).textContent")
        )
    turns = [
        {"role": "user", "content": "for i in"},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "for i in"},
    ]
    made = drafting.client.chat.completions.create(model="tiny", messages=turns, max_tokens=5)
    assert answers[1] == made.choices[0].message.content != ""


@pytest.mark.slow
def test_a_phone_in_the_dark(drafting, browser):
    page = browser.page(drafting.url, width=390, height=844)
    page.wait(READY)
    light = page.value("getComputedStyle(document.body).backgroundColor")
    page.prefer(dark=True)
    assert page.value("getComputedStyle(document.body).backgroundColor") != light
    page.type("x" * 300)
    page.press("Enter")
    page.wait(ENDED)
    assert page.value("document.documentElement.scrollWidth") <= 390
    beyond = """[...document.querySelectorAll('body *')].filter((e) => !e.closest('.hidden, #tree, #ring, .wide table')
        && e.getBoundingClientRect().right > 390).map((e) => e.outerHTML.slice(0, 80))"""
    assert page.value(beyond) == []


@pytest.mark.slow
def test_every_control_has_a_name_and_the_key_is_typed_in(drafting, browser):
    with serving(drafting.engine, key="open sesame") as locked:
        page = browser.page(locked.url)
        page.wait("!document.getElementById('key-row').hidden")
        assert page.value(FOCUSED) == "key"
        page.type("wrong")
        page.press("Enter")
        page.wait("/not the server/.test(document.getElementById('status').textContent)")
        page.value("document.getElementById('key').value = ''")
        page.type("open sesame")
        page.press("Enter")
        page.wait(READY)
        nodes = page.ask("Accessibility.getFullAXTree")["nodes"]
        controls = {"textbox", "button", "radio", "spinbutton", "log", "image", "table", "status"}
        named = [
            (n["role"]["value"], n.get("name", {}).get("value"))
            for n in nodes
            if n.get("role", {}).get("value") in controls
        ]
        assert {role for role, _ in named} >= {"textbox", "button", "radio", "spinbutton", "log"}
        assert all(name for role, name in named if role != "status"), named
