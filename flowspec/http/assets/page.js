// The page: it asks this server as any other client does, and watches its ring.

import { drawRing, drawTree, ms, percent } from "./draw.js";

const $ = (id) => document.getElementById(id);
const AGAIN = 3000; // ms until a lost server is asked again
let key = "", turns = [], running = null, watching = null, snapshot = null;

// ---- the server -------------------------------------------------------------------------------
function ask(path, options = {}) {
  const shown = key ? { Authorization: `Bearer ${key}` } : {};
  return fetch(path, { ...options, headers: { ...options.headers, ...shown } });
}

async function refusal(answer) {
  const told = await answer.json().catch(() => null);
  return told?.error?.message ?? `the server answers ${answer.status}`;
}

/** Yield the objects of a stream of server-sent events. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

function say(text) {
  $("status").textContent = text;
}

async function connect() {
  try {
    const health = await ask("health");
    if (!health.ok) throw new Error(await refusal(health));
    const answer = await ask("v1/models");
    if (answer.status === 401) {
      const asked = !$("key-row").hidden;
      $("key-row").hidden = false;
      $("key").focus();
      return say(asked ? "this is not the server's key" : "the server has a key: type it in");
    }
    if (!answer.ok) throw new Error(await refusal(answer));
    const model = (await answer.json()).data[0];
    $("key-row").hidden = true;
    $("model").textContent = model.id;
    choose(model.chat_template === false ? "completion" : "chat");
    say("ready");
    $("prompt").focus();
    watch(null);
  } catch (error) {
    say(String(error.message));
    setTimeout(connect, AGAIN);
  }
}

// ---- the ring ---------------------------------------------------------------------------------
/** Watch the ring, and the tree of the request with this id; this ends what was watched before. */
async function watch(request) {
  watching?.abort();
  const mine = (watching = new AbortController());
  mine.request = request;
  if (document.hidden) return;
  const path = request === null ? "pipeline" : `pipeline?request=${request}`;
  try {
    const answer = await ask(path, { signal: mine.signal });
    if (!answer.ok) throw new Error(await refusal(answer));
    for await (const seen of events(answer)) if (watching === mine) show(seen);
    throw new Error("the server has ended");
  } catch (error) {
    if (watching !== mine) return;
    say(String(error.message));
    setTimeout(() => watching === mine && watch(request), AGAIN);
  }
}

function show(seen) {
  snapshot = seen;
  drawTree($("tree"), seen.tree);
  drawRing($("ring"), seen);
  $("tree-facts").textContent = seen.tree
    ? `${seen.tree.drafted} nodes drafted, ${seen.tree.sent} of them sent; ${seen.tree.nodes.length + seen.tree.more} are alive, of which the oldest are shown`
    : "";
  const others = seen.running + seen.waiting > 1 ? `; ${seen.running} texts in the ring, ${seen.waiting} wait` : "";
  $("ring-facts").textContent = `${seen.batches} batches with ${seen.rows} rows on their way${seen.hop_ms ? `; a hop takes ${ms(seen.hop_ms)}` : ""}${others}`;
  $("stages").replaceChildren(...seen.stages.map((stage) => row(stage, seen.running)));
  plain();
}

function row(stage, live) {
  const made = document.createElement("tr"), known = stage.forward_ms !== undefined;
  const share = (value) => (value == null ? "–" : percent(value));
  const cells = [stage.name, live ? share(stage.busy) : "–", share(stage.busy_last), known ? ms(stage.forward_ms) : "–", known ? ms(stage.row_ms) : "–"];
  cells.forEach((text, k) => {
    const cell = document.createElement(k ? "td" : "th");
    if (!k) cell.scope = "row";
    cell.textContent = text;
    made.append(cell);
  });
  return made;
}

// ---- speed ------------------------------------------------------------------------------------
let pace = { tokens: 0, accepted: 0, first: 0, last: 0 };

const rate = () => (pace.last > pace.first ? (1000 * (pace.tokens - pace.burst)) / (pace.last - pace.first) : null);

/** Take in the origins of tokens that came together. */
function count(origins) {
  if (!origins.length) return;
  pace.last = performance.now();
  if (!pace.tokens) [pace.first, pace.burst] = [pace.last, origins.length];
  pace.tokens += origins.length;
  pace.accepted += origins.filter(([, accepted]) => accepted).length;
  $("rate").textContent = rate() ? `${rate().toFixed(1)} tok/s` : "–";
  $("share").textContent = `${pace.accepted} of ${pace.tokens}`;
  plain();
}

function plain() {
  if (snapshot?.plain_ms == null) return;
  $("plain-name").textContent = snapshot.plain_tried ? "without speculation, measured" : "without speculation, estimated";
  $("plain").textContent = `${(1000 / snapshot.plain_ms).toFixed(1)} tok/s`;
  $("ratio").textContent = rate() ? `${((rate() * snapshot.plain_ms) / 1000).toFixed(1)} times as fast` : "–";
}

// ---- texts ------------------------------------------------------------------------------------
const mode = () => document.querySelector("input[name=mode]:checked").value;

function choose(value) {
  document.querySelector(`input[name=mode][value=${value}]`).checked = true;
  $("prompt-label").textContent = value === "chat" ? "Message" : "Text to go on with";
}

function turn(kind, text) {
  const made = document.createElement("p");
  made.className = `turn ${kind}`;
  made.textContent = text;
  $("log").append(made);
  $("log").scrollTop = $("log").scrollHeight;
  return made;
}

/** Return an id that nobody guesses: whoever knows it may watch the request's tree. */
function anId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function body(prompt) {
  const asked = { stream: true, stream_options: { include_usage: true, include_origins: true } };
  if ($("most").value) asked.max_tokens = Number($("most").value);
  if ($("temperature").value) asked.temperature = Number($("temperature").value);
  return mode() === "chat" ? { ...asked, messages: [...turns, { role: "user", content: prompt }] } : { ...asked, prompt };
}

async function send() {
  const prompt = $("prompt").value;
  if (running || !prompt.trim()) return;
  const chat = mode() === "chat", asked = body(prompt), id = anId(), before = turns;
  running = new AbortController();
  pace = { tokens: 0, accepted: 0, first: 0, last: 0 };
  $("prompt").value = "";
  busy(true);
  turn("user", prompt);
  const answer = turn("answer", "");
  watch(id);
  try {
    const ended = await read(chat ? "v1/chat/completions" : "v1/completions", asked, id, answer);
    say(ended);
  } catch (error) {
    if (running.signal.aborted) say("stopped");
    else turn("failed", String(error.message)), say("failed");
  }
  if (chat && answer.textContent && turns === before) turns = [...asked.messages, { role: "assistant", content: answer.textContent }];
  running = null;
  busy(false);
}

/** Ask for a text and show it as it comes; return what it took, in words. */
async function read(path, asked, id, into) {
  const headers = { "Content-Type": "application/json", "X-Request-Id": id };
  const answer = await ask(path, { method: "POST", headers, body: JSON.stringify(asked), signal: running.signal });
  if (!answer.ok) throw new Error(await refusal(answer));
  let took = "";
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    const origins = event.choices[0]?.origins;
    if (origins) append(into, origins), count(origins);
    if (event.usage) {
      const wasted = event.usage.completion_tokens_details.rejected_prediction_tokens;
      took = `${event.usage.completion_tokens} tokens; ${wasted} drafted ones were sent in vain`;
    }
  }
  return took;
}

function append(into, origins) {
  const log = $("log"), below = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  for (const [text, accepted] of origins) {
    if (!text) continue;
    const token = document.createElement("span");
    token.className = accepted ? "accepted" : "own";
    token.textContent = text;
    into.append(token);
  }
  if (below) log.scrollTop = log.scrollHeight;
}

function busy(now) {
  $("send").disabled = now;
  $("stop").disabled = !now;
  $("log").setAttribute("aria-busy", String(now));
  if (now) say("the text is being made");
}

// ---- people -----------------------------------------------------------------------------------
$("form").addEventListener("submit", (event) => (event.preventDefault(), send()));
$("stop").addEventListener("click", () => running?.abort());
$("fresh").addEventListener("click", () => {
  running?.abort();
  turns = [];
  $("log").replaceChildren();
  $("prompt").focus();
});
$("key-use").addEventListener("click", () => {
  key = $("key").value;
  connect();
});
$("mode").addEventListener("change", () => choose(mode()));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key !== "Enter" || event.isComposing) return;
  if (event.target === $("prompt") && !event.shiftKey) event.preventDefault(), send();
  if (event.target === $("key")) event.preventDefault(), $("key-use").click();
});
document.addEventListener("visibilitychange", () => watching && watch(watching.request));
connect();
