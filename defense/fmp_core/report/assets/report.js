"use strict";
// One canvas per layer: thousands of maps draw in milliseconds, and colours come from the style sheet.
const data = JSON.parse(document.getElementById("maps").textContent);
const tip = document.getElementById("tip");
const HEIGHT = 46, TOP = 5, BOTTOM = 12, RADIUS = 2.2, HAS_TAC = Boolean(data.layers[0].tac);
const largest = Math.max(...data.layers.map(layer => layer.channel.length));
let low = Infinity, high = 0, choice = data.own, spread = true;
// Dots stand lower the fewer images a map leaves correct, or the more the inverted trigger changes its activation.
for (const layer of data.layers) {
  const most = layer.change && Math.max(...layer.change, 1e-12);
  layer.score = layer.correct || layer.change.map(change => -change / most);
}
for (const layer of data.layers) for (const score of layer.score) { low = Math.min(low, score); high = Math.max(high, score); }
const percent = correct => (100 * correct / data.samples).toFixed(correct * 100 % data.samples ? 1 : 0) + " %";

const shareAt = x => spread ? Math.pow(2 * largest, x - 1) : x;
const place = share => spread ? 1 + Math.log(share) / Math.log(2 * largest) : share;
const at = (layer, position) => place((position + .5) / layer.channel.length);
const heightOf = score => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (high > low ? (score - low) / (high - low) : .5);

// What each choice of p prunes was worked out by the program: the first maps of each layer, in the order drawn.
const cutOf = layer => {
  const [pruned, firstTied, lastTied, tied, found] = layer.cuts[choice];
  return { pruned, firstTied, lastTied, tied, found };
};
const isPruned = (layer, position) => position < cutOf(layer).pruned;

function sized(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return [pen, width];
}

function drawStrip(layer, row, colour) {
  const [pen, width] = sized(row.canvas, HEIGHT), n = layer.channel.length, cut = cutOf(layer);
  const x = position => 4 + (width - 8) * at(layer, position);
  const line = (count, style, thick) => {
    const middle = 4 + (width - 8) * place(count / n);
    pen.fillStyle = style;
    pen.fillRect(Math.round(middle - thick / 2), 0, thick, HEIGHT - BOTTOM + 4);
  };
  if (cut.tied) {
    pen.fillStyle = colour.band;
    pen.fillRect(x(cut.firstTied) - 3, heightOf(layer.score[cut.firstTied]) - 5, x(cut.lastTied) - x(cut.firstTied) + 6, 10);
  }
  if (layer.correct) {
    for (const [count] of layer.cuts) if (count && count !== cut.pruned) line(count, colour.rule, 1);
    if (cut.pruned) line(cut.pruned, colour.after, 2);
  }
  for (let position = n - 1; position >= 0; position--) {
    const pruned = position < cut.pruned;
    pen.fillStyle = pruned ? colour.after : colour.before;
    pen.beginPath();
    pen.arc(x(position), heightOf(layer.score[position]), pruned ? RADIUS + .6 : RADIUS, 0, 7);
    pen.fill();
  }
  pen.fillStyle = colour.trigger;
  for (let position = 0; HAS_TAC && position < n; position++)
    if (layer.tacRank[position] <= cut.pruned) pen.fillRect(x(position) - 1, HEIGHT - 9, 2, 8);
  if (row.active !== undefined) {
    pen.strokeStyle = colour.ink;
    pen.lineWidth = 1.5;
    pen.beginPath();
    pen.arc(x(row.active), heightOf(layer.score[row.active]), RADIUS + 3, 0, 7);
    pen.stroke();
  }
  units.forEach((unit, i) => {
    row.counts[i].firstChild.textContent = cut[unit];
    row.counts[i].classList.toggle("zero", !cut[unit]);
  });
}

function drawHead(canvas, colour) {
  const [pen, width] = sized(canvas, 20);
  pen.font = "12px " + getComputedStyle(document.body).fontFamily;
  pen.textAlign = "center";
  if (data.scope === "global" || !data.samples) return;
  const p = data.choices[choice];
  let free = -Infinity;
  for (const value of [...data.choices].sort((a, b) => (b === p) - (a === p) || b - a)) {
    const x = 4 + (width - 8) * place(1 / value), text = "p " + value, half = pen.measureText(text).width / 2;
    if (value !== p && (x - half < free || Math.abs(x - 4 - (width - 8) * place(1 / p)) < 2 * half + 4)) continue;
    pen.fillStyle = value === p ? colour.after : colour.soft;
    pen.fillText(text, Math.max(x, half), 14);
    if (value !== p) free = x + half + 6;
  }
}

function element(tag, kind, parent, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

const box = document.getElementById("strips");
const units = ["pruned", ...(data.samples ? ["tied"] : []), ...(HAS_TAC ? ["found"] : [])];
box.style.setProperty("--counts", units.length);
const head = element("div", "strip head", box);
element("span", "name", head, "layer");
const headCanvas = element("canvas", "", head);
for (const unit of units) element("span", "", head, unit);
const rows = data.layers.map(layer => {
  const row = element("div", "strip", box), name = element("span", "name", row);
  element("code", "", name, layer.name);
  element("small", "", name, layer.channel.length + " maps");
  const canvas = element("canvas", "", row);
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${layer.name}: ${layer.channel.length} feature maps; arrow keys step through them`);
  const counts = units.map(unit => {
    const cell = element("span", "", row);
    cell.append("");
    element("span", "unit", cell, " " + unit);
    return cell;
  });
  return { canvas, counts, active: undefined };
});

let colours;
function draw(only) {
  const style = getComputedStyle(document.documentElement);
  colours = Object.fromEntries(["ink", "soft", "rule", "before", "after", "trigger", "band"].map(k => [k, style.getPropertyValue("--" + k).trim()]));
  if (only === undefined) drawHead(headCanvas, colours);
  data.layers.forEach((layer, i) => { if (only === undefined || only === i) drawStrip(layer, rows[i], colours); });
}

function show(i, position, x, y) {
  const layer = data.layers[i];
  rows[i].active = position;
  draw(i);
  tip.replaceChildren();
  element("b", "", tip, `${layer.name}, channel ${layer.channel[position]}`);
  const add = text => { tip.append(document.createElement("br"), text); };
  add(`rank ${position + 1} of ${layer.channel.length}${isPruned(layer, position) ? ", pruned" : ""}`);
  if (layer.change) add(`activation changed by ${layer.change[position]}`);
  else add(`${layer.correct[position]} of ${data.samples} correct (${percent(layer.correct[position])}), ${layer.margin[position] === null ? "dropped by racing" : "margin " + layer.margin[position]}`);
  if (HAS_TAC) add(`TAC ${layer.tac[position]}, rank ${layer.tacRank[position]}`);
  tip.hidden = false;
  const size = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - size.width - 8)) + "px";
  tip.style.top = (y + 20 + size.height > innerHeight ? y - size.height - 12 : y + 20) + "px";
}
function hide(i) {
  rows[i].active = undefined;
  tip.hidden = true;
  draw(i);
}
// The nearest map to the pointer: among those near its column, the one whose dot is closest.
function nearest(layer, canvas, x, y) {
  const width = canvas.clientWidth - 8, n = layer.channel.length;
  const guess = Math.round(shareAt(Math.min(1, Math.max(0, (x - 4) / width))) * n - .5);
  let best = 0, distance = Infinity;
  for (let position = Math.max(0, guess - 40); position <= Math.min(n - 1, guess + 40); position++) {
    const away = Math.hypot(4 + width * at(layer, position) - x, (heightOf(layer.score[position]) - y) / 3);
    if (away < distance) { distance = away; best = position; }
  }
  return best;
}
rows.forEach((row, i) => {
  const follow = event => {
    const frame = row.canvas.getBoundingClientRect();
    show(i, nearest(data.layers[i], row.canvas, event.clientX - frame.left, event.clientY - frame.top), event.clientX, event.clientY);
  };
  row.canvas.addEventListener("pointermove", follow);
  row.canvas.addEventListener("pointerdown", follow);
  row.canvas.addEventListener("pointerleave", () => hide(i));
  row.canvas.addEventListener("blur", () => hide(i));
  row.canvas.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const last = data.layers[i].channel.length - 1, frame = row.canvas.getBoundingClientRect();
    const position = row.active === undefined ? 0 : Math.max(0, Math.min(last, row.active + step));
    show(i, position, frame.left + 4 + (frame.width - 8) * at(data.layers[i], position), frame.top + HEIGHT / 2);
  });
});

const ps = document.getElementById("ps");
if (ps) data.choices.forEach((value, i) => {
  const label = element("label", "", ps), input = element("input", "", label);
  Object.assign(input, { type: "radio", name: "p", value, checked: i === choice });
  element("span", "", label, value);
});
document.getElementById("controls").addEventListener("change", event => {
  if (event.target.name === "p") choice = data.choices.indexOf(Number(event.target.value));
  else spread = event.target.value === "spread";
  draw();
});
document.getElementById("range").textContent = !data.samples ? "heights run from no change (top) to the layer’s largest"
  : low === high ? `all stand at ${percent(low)} correct` : `heights run from ${percent(low)} to ${percent(high)} correct`;
const started = performance.now();
draw();
document.documentElement.dataset.drawn = (performance.now() - started).toFixed(1);
new ResizeObserver(() => draw()).observe(box);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
