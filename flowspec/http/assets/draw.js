// Drawings of a snapshot: the tree of a request, and the ring.

const SVG = "http://www.w3.org/2000/svg";
const COLUMN = 74, ROW = 22, BOX = [62, 17], LETTERS = 8, MOST = 30;

function make(name, attributes = {}, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

export const ms = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)) + " ms";
export const percent = (share) => Math.round(100 * share) + " %";

// ---- the tree ---------------------------------------------------------------------------------
const shown = new Map(); // id of a node -> its drawing, until a snapshot after its end

/** Return what a person sees of a token. */
function label(text) {
  const seen = [...text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·")];
  return seen.length > LETTERS ? seen.slice(0, LETTERS - 1).join("") + "…" : seen.join("");
}

/** Return a map of id -> [column, row]: depth to the right, leaves below each other. */
function places(nodes) {
  const children = new Map(nodes.map(([id]) => [id, []]));
  for (const [id, parent] of nodes) children.get(parent)?.push(id);
  const found = new Map();
  let leaves = 0;
  const place = (id, depth) => {
    const below = children.get(id).map((child) => place(child, depth + 1));
    const row = below.length ? (below[0] + below[below.length - 1]) / 2 : leaves++;
    found.set(id, [depth, row]);
    return row;
  };
  if (nodes.length) place(nodes[0][0], 0);
  return found;
}

function drawn(svg, id, text) {
  const node = make("g", { class: "node", "data-id": id });
  node.append(make("rect", { x: 0, y: -BOX[1] / 2, width: BOX[0], height: BOX[1], rx: 3 }), make("text", { x: 4, y: 4 }, label(text)));
  svg.append(node);
  return node;
}

/** Return the nodes for which there is room: the oldest in the ring, then the oldest drafted ones. */
function chosen(nodes) {
  const ordered = [...nodes.filter((node) => node[3]), ...nodes.filter((node) => !node[3])];
  const kept = new Set(ordered.slice(0, MOST).map(([id]) => id)); // a node's parent is older, and sent if it is
  return nodes.filter(([id]) => kept.has(id));
}

/** Show a tree; null ends it. Nodes that are gone stay for one more snapshot, as text or as pruned. */
export function drawTree(svg, tree) {
  const all = tree?.nodes ?? [], nodes = chosen(all), alive = new Set(all.map(([id]) => id));
  const text = new Set(tree?.text ?? []), at = places(nodes);
  for (const [id, node] of shown) {
    if (at.has(id)) continue;
    if (node.dataset.gone || alive.has(id)) {
      node.remove();
      shown.delete(id);
    } else {
      node.dataset.gone = "yes";
      node.setAttribute("class", tree === null ? "node" : text.has(id) ? "node text" : "node dead");
    }
  }
  for (const edge of svg.querySelectorAll(".edge")) edge.remove();
  nodes.forEach(([id, parent, token, sent], index) => {
    const [column, row] = at.get(id), node = shown.get(id) ?? drawn(svg, id, token);
    shown.set(id, node);
    node.setAttribute("class", index === 0 ? "node root" : sent ? "node sent" : "node");
    node.style.transform = `translate(${column * COLUMN}px, ${(row + 0.5) * ROW}px)`;
    if (at.has(parent)) {
      const [x, y] = at.get(parent);
      svg.prepend(make("path", { class: "edge", d: `M${x * COLUMN + BOX[0]} ${(y + 0.5) * ROW} L${column * COLUMN} ${(row + 0.5) * ROW}` }));
    }
  });
  fit(svg, [...at.values()]);
  const sent = all.filter((node) => node[3]).length;
  svg.setAttribute("aria-label", nodes.length ? `${all.length + tree.more} nodes, ${sent} of them in the ring` : "no tree: nothing is being made");
  if (tree === null && shown.size) setTimeout(() => tidy(), 600);
}

function tidy() {
  for (const [id, node] of shown) {
    if (!node.dataset.gone) continue;
    node.remove();
    shown.delete(id);
  }
}

function fit(svg, spots) {
  if (!spots.length) return;
  const width = Math.max(svg.clientWidth, ...spots.map(([column]) => (column + 1) * COLUMN));
  const height = Math.max(svg.clientHeight, ...spots.map(([, row]) => (row + 1) * ROW));
  svg.setAttribute("viewBox", `-2 0 ${width + 4} ${height}`);
  svg.setAttribute("preserveAspectRatio", "xMinYMin meet");
}

// ---- the ring ---------------------------------------------------------------------------------
/** Show rank 0 and the stages round an ellipse; a rim shows for which share of the time it computes. */
export function drawRing(svg, snapshot) {
  const busy = (stage) => (snapshot.running && stage.busy != null ? stage.busy : stage.busy_last);
  const ranks = [{ name: "rank 0", about: snapshot.draft_ms ? `draft ${ms(snapshot.draft_ms)}` : "decides" }];
  for (const stage of snapshot.stages) ranks.push({ name: stage.name, about: stage.forward_ms === undefined ? "" : ms(stage.forward_ms), busy: busy(stage) });
  const width = Math.max(300, svg.clientWidth), height = 208, radius = Math.min(22, 150 / ranks.length + 8);
  const spot = (k) => {
    const turn = (2 * Math.PI * k) / ranks.length - Math.PI / 2;
    return [width / 2 + Math.cos(turn) * (width / 2 - 60), height / 2 - 8 + Math.sin(turn) * (height / 2 - 36)];
  };
  const marker = make("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" });
  marker.append(make("path", { d: "M0 0 L8 4 L0 8 z" }));
  const parts = [marker];
  ranks.forEach((_, k) => parts.push(...link(spot(k), spot((k + 1) % ranks.length), radius + 5, snapshot.hop_ms)));
  ranks.forEach((rank, k) => parts.push(...circle(spot(k), radius, rank)));
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(...parts);
}

function link([x, y], [toX, toY], gap, hop) {
  const length = Math.hypot(toX - x, toY - y) || 1, dx = (toX - x) / length, dy = (toY - y) / length;
  // what goes back is drawn beside what comes, if there are two ranks
  const [sideX, sideY] = [-dy * 4, dx * 4];
  const line = make("line", { class: "link", x1: x + dx * gap + sideX, y1: y + dy * gap + sideY, x2: toX - dx * gap + sideX, y2: toY - dy * gap + sideY });
  return hop ? [line, make("text", { class: "soft", x: (x + toX) / 2 - dy * 22, y: (y + toY) / 2 + dx * 12 + 4 }, ms(hop))] : [line];
}

function circle([x, y], radius, rank) {
  const around = 2 * Math.PI * radius, share = rank.busy ?? 0;
  return [
    make("circle", { class: "rim", cx: x, cy: y, r: radius }),
    make("circle", { class: "busy", cx: x, cy: y, r: radius, "stroke-dasharray": `${share * around} ${around}`, transform: `rotate(-90 ${x} ${y})` }),
    make("text", { x, y: y + 4 }, rank.busy == null ? "" : percent(rank.busy)),
    make("text", { x, y: y + radius + 15 }, rank.about ? `${rank.name}: ${rank.about}` : rank.name),
  ];
}
