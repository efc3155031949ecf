// The page around gpt.js. It shows a recorded game, the model's answer in each step, and its answer to an edited page.
//
// What differs between Breakout and other games is in breakout.js and text.js; one of them follows in the file. Each has
//   ACTION, SCORE, LIVES           where these are in a frame
//   SCORE_NAME                     what the points are called
//   stateOf(i)                     the state of frame i, from which a page can be drawn, and which editing replaces
//   pageOf(state)                  the page, as indices in game.characters
//   partsOf(line, row)             the parts of a line of text that have one colour, each {text, name, colour}
//   eventAt(i, name)               whether an event happened between frame i and the one before
//   headName(head)                 what a head looks at
//   describedToo(cell)             what else is to be said about a cell, or ""
//   edit(cell), typed(event)       what a click or Enter does in a cell, and any other key with the page in focus
//   firstCell()                    where the cursor is at first
//   forget(), complete()           what happens before and after a page is drawn
//   drawOver(context, w, h)        what is drawn over the heat; w and h are the size of a cell
//   begin()                        what is done once, at the start
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { frames, stages, config, things, actions } = data;
const game = { ...config, ...data.game };
const T = game.rows * game.columns;
const WIDTH = game.columns - 1; // the newline is not drawn
// The colours of no weight and of the largest, in OKLab, where equal steps look equal.
const HEAT = {
  light: [[1, 0, 0], [0.9, 0.035, 0.11]],
  dark: [[0.18, 0, 0], [0.37, 0.065, 0.075]],
};
const OUTLINED = 0.05; // the weight from which a character is outlined
const MEAN = "mean"; // of all heads, in place of the number of a head
const GAME_OVER = -1; // in place of an action, as in recording.py
const MARGIN = 44; // of the chart, left and right
const element = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const manyActions = actions.length > 8;
const longNames = actions.some((name) => name.length > 5); // which leave the bars little room
const percent = (share) => (share >= 0.0995 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)) + " %";

const models = stages.map((stage) => new GPT(config, unpack(stage.weights)));
const shown = { frame: 0, head: MEAN, stage: stages.length - 1 };
let edited = null; // the state of the page once it has been edited, as `stateOf` returns one
let cursor = null; // the cell {row, column} that is described
let playing = null; // the number of the next animation frame, while the replay plays
let answer = null; // what the model read last
let answered = null; // the stage and the page that `answer` belongs to
let held = false; // whether the cursor stays in its cell when the mouse moves
let later = null; // the timer of `settle`

// What the file holds

function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const weights = {};
  let at = 0;
  for (const [name, size] of data.weights) {
    weights[name] = Float32Array.from({ length: size }, (_, i) => view.getFloat32(at + 4 * i, true));
    at += 4 * size;
  }
  return weights;
}

const current = () => edited ?? stateOf(shown.frame);

const textOf = (page) => Array.from(page, (character) => game.characters[character]).join("");

// Drawing

function update() {
  const page = pageOf(current());
  const asked = `${shown.stage} ${textOf(page)}`;
  // Nothing is computed when another head is chosen, which shows another part of the same answer.
  if (asked !== answered) answer = models[shown.stage].read(page);
  answered = asked;
  forget();
  drawPage();
  drawHeat();
  drawAnswer();
  drawChange();
  drawChart();
  describeCell();
  const frame = frames[shown.frame];
  const games = gameOf(frames.length - 1);
  const number = games > 1 ? ` · game ${gameOf(shown.frame)} of ${games}` : "";
  let end = "";
  if (frame[ACTION] < 0) end = frame[ACTION] === GAME_OVER ? " · the game is over" : " · the recording ends here";
  const edit = edited ? " · edited: answer and attention are those of the edited page" : "";
  const step = `Step ${shown.frame} of ${frames.length - 1}${number}`;
  const lives = frame[LIVES] === undefined ? "" : ` · lives ${frame[LIVES]}`;
  element("status").textContent = `${step} · ${SCORE_NAME} ${frame[SCORE]}${lives}${end}${edit}`;
  element("slider").value = shown.frame;
  element("slider").setAttribute("aria-valuetext", `step ${shown.frame}`);
  element("undo").disabled = !edited;
  clearTimeout(later);
  if (!playing) later = setTimeout(settle, 300);
  complete();
}

// The number of the game that a frame belongs to
const gameOf = (i) => 1 + frames.slice(0, i).filter((frame) => frame[ACTION] === GAME_OVER).length;

// Update the address and tell a screen reader what is shown. This is done only once nothing has moved for a while,
// because browsers limit how often the address may change, and a screen reader needs time to speak.
function settle() {
  const place = `#frame=${shown.frame}&head=${shown.head}&stage=${shown.stage}`;
  if (location.hash !== place) history.replaceState(null, "", place);
  const told = actions.map((name, i) => [name, answer.probabilities[i]]).filter(([, p]) => p >= 0.01 || !manyActions);
  say(`${element("status").textContent}. ${told.map(([name, p]) => `${name} ${p.toFixed(2)}`).join(", ")}`);
}

function say(text) {
  element("said").textContent = text;
}

// Show the text of the page, in spans of one colour. Lines that have not changed are left alone.
function drawPage() {
  const page = textOf(pageOf(current()));
  for (let row = 0; row < game.rows; row++) {
    const line = element("page").children[row];
    const text = page.slice(row * game.columns, row * game.columns + WIDTH);
    if (line.dataset.text === text) continue;
    line.dataset.text = text;
    line.replaceChildren(...partsOf(text, row).map(({ text, name, colour }) => {
      const span = document.createElement("span");
      span.textContent = text;
      span.className = name ?? "";
      if (colour) span.style.setProperty("--own", colour);
      return span;
    }), "\n");
  }
}

function prepare(canvas, width, height) {
  const scale = devicePixelRatio || 1;
  const context = canvas.getContext("2d");
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  context.scale(scale, scale);
  return context;
}

// Return how hot a weight is, from 0 to 1: its logarithm, and 0 where it is the mean of all weights or less.
const level = (weight) => (weight * T > 1 ? Math.min(1, Math.log(weight * T) / Math.log(T)) : 0);

function colour(at) {
  const [from, to] = HEAT[dark.matches ? "dark" : "light"];
  return `oklab(${from.map((value, i) => (value + at * (to[i] - value)).toFixed(4)).join(" ")})`;
}

function weightOf(t) {
  const { attention } = answer;
  if (shown.head !== MEAN) return attention[shown.head][t];
  return attention.reduce((sum, head) => sum + head[t], 0) / attention.length;
}

function sizes() {
  const box = element("page").getBoundingClientRect();
  return { width: box.width, height: box.height, w: box.width / WIDTH, h: box.height / game.rows };
}

function drawHeat() {
  const { width, height, w, h } = sizes();
  const context = prepare(element("heat"), width, height);
  const ink = style("--ink");
  const marked = [];
  for (let t = 0; t < T; t++) {
    const [row, column] = [Math.floor(t / game.columns), t % game.columns];
    const weight = weightOf(t);
    if (column === WIDTH || weight * T <= 1) continue;
    context.fillStyle = colour(level(weight));
    context.fillRect(column * w, row * h, w + 0.5, h + 0.5);
    if (weight >= OUTLINED) marked.push([row, column, weight]);
  }
  context.strokeStyle = ink;
  for (const [row, column, weight] of marked) {
    context.lineWidth = Math.min(weight >= 0.25 ? 2 : 1, w / 5); // on a small screen it must not hide the character
    context.strokeRect(column * w + 0.5, row * h + 0.5, w - 1, h - 1);
  }
  drawOver(context, w, h);
  if (cursor) {
    context.setLineDash([2, 2]);
    context.lineWidth = 2;
    context.strokeStyle = style("--accent");
    context.strokeRect(cursor.column * w, cursor.row * h, w, h);
  }
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function drawAnswer() {
  const best = answer.probabilities.indexOf(Math.max(...answer.probabilities));
  const taken = frames[shown.frame][ACTION];
  const wasTaken = !edited && shown.stage === stages.length - 1 && taken >= 0; // the last stage has played
  actions.forEach((name, i) => {
    const [label, bar, number] = element("actions").rows[i].cells;
    const chosen = i === (wasTaken ? taken : best);
    const remark = wasTaken ? " taken" : longNames ? "" : " most probable";
    element("actions").rows[i].className = chosen ? "chosen" : "";
    label.textContent = (chosen ? "▶ " : "") + name;
    bar.firstChild.value = answer.probabilities[i];
    number.textContent = answer.probabilities[i].toFixed(3) + (chosen ? remark : "");
    if (chosen && manyActions) showRow(element("actions").rows[i]);
  });
  element("value").textContent = answer.value.toFixed(3);
}

// Scroll a row of the long list of actions into view, and nothing else.
function showRow({ offsetTop: top, offsetHeight: height }) {
  const list = element("answers");
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + height > list.scrollTop + list.clientHeight) list.scrollTop = top + height - list.clientHeight;
}

// Show along the page's edges how probable it is, by the model, that a row or column changes next, with a dot where it
// did change.
function drawChange() {
  const { width, height, w, h } = sizes();
  const next = frames[shown.frame][ACTION] >= 0 && !edited ? pageOf(stateOf(shown.frame + 1)) : null;
  const page = pageOf(current());
  const did = { row: new Set(), column: new Set() };
  if (next) for (let t = 0; t < T; t++) {
    if (page[t] === next[t]) continue;
    did.row.add(Math.floor(t / game.columns));
    did.column.add(t % game.columns);
  }
  const predicted = {
    row: answer.changes.slice(0, game.rows),
    column: answer.changes.slice(game.rows, game.rows + WIDTH),
  };
  const strips = { row: ["rows", 1.6 * w, height], column: ["columns", width, 1.1 * h] };
  for (const [what, [id, stripWidth, stripHeight]] of Object.entries(strips)) {
    const context = prepare(element(id), stripWidth, stripHeight);
    const ink = style("--ink");
    predicted[what].forEach((probability, i) => {
      const box = what === "row" ? [2, i * h, stripWidth - 2, h] : [i * w, 2, w, stripHeight - 2];
      context.fillStyle = colour(probability);
      context.fillRect(...box);
      if (!did[what].has(i)) return;
      context.fillStyle = ink;
      context.beginPath();
      context.arc(box[0] + box[2] / 2, box[1] + box[3] / 2, Math.max(1.2, w / 4), 0, 7);
      context.fill();
    });
    element(id).style[what === "row" ? "left" : "top"] = (what === "row" ? width : height) + "px";
  }
  const list = (numbers) => (numbers.length > 14 ? `${numbers.length} of them` : numbers.join(", ")) || "none";
  const likely = (what) => list([...predicted[what].keys()].filter((i) => predicted[what][i] >= 0.5));
  let text = "Predicted to change next (along the edges of the page): ";
  text += `rows ${likely("row")}; columns ${likely("column")}.`;
  const columns = [...did.column].sort((a, b) => a - b);
  if (next) text += ` Changed (dots): rows ${list([...did.row])}; columns ${list(columns)}.`;
  element("prediction").textContent = text;
}

function drawChart() {
  const canvas = element("chart");
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  const context = prepare(canvas, width, height);
  canvas.style.width = "100%";
  const values = stages[shown.stage].values;
  const n = Math.max(frames.length - 1, 1);
  const left = MARGIN;
  const right = width - MARGIN;
  const top = 18;
  const bottom = height - 6;
  const place = (i) => left + ((right - left) * i) / n;
  context.font = "12px system-ui, sans-serif";
  const lines = [ // name, numbers, variable of the colour, dashes, where the labels begin
    [SCORE_NAME, frames.map((frame) => frame[SCORE]), "--accent", [], 4],
    ["value", values, "--paddle", [5, 3], right + 4],
  ];
  for (const [name, numbers, variable, dash, labelAt] of lines) {
    const low = Math.min(...numbers);
    const high = Math.max(...numbers);
    const range = high - low || 1;
    const up = (value) => bottom - ((bottom - top) * (value - low)) / range;
    context.strokeStyle = context.fillStyle = style(variable);
    context.setLineDash(dash);
    context.lineWidth = 1.5;
    context.beginPath();
    numbers.forEach((value, i) => context.lineTo(place(i), up(value)));
    context.stroke();
    context.fillText(name, labelAt, 11);
    const digits = range < 1 ? 2 : 1;
    for (const value of new Set([low, high])) {
      const below = value === high && high > low ? 12 : 0; // pixels
      context.fillText(Number.isInteger(value) ? value : value.toFixed(digits), labelAt, up(value) + below);
    }
  }
  context.setLineDash([]);
  context.strokeStyle = style("--ink");
  context.lineWidth = 1;
  context.strokeRect(place(shown.frame), top, 0, bottom - top);
  const now = `${SCORE_NAME} ${frames[shown.frame][SCORE]}, value ${values[shown.frame].toFixed(2)}`;
  canvas.setAttribute("aria-label", `${SCORE_NAME} and value over ${n} steps; now ${now}`);
}

function drawScale() {
  const canvas = element("scale");
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  const context = prepare(canvas, width, height);
  for (let i = 0; i < width; i++) {
    context.fillStyle = colour(i / width);
    context.fillRect(i, 0, 1, height / 2);
  }
  canvas.style.width = "100%";
  context.fillStyle = style("--ink");
  context.font = "12px system-ui, sans-serif";
  for (const weight of [0.001, 0.01, 0.1]) {
    if (weight * T <= 1.5) continue; // on a small page, where even the mean is no less
    context.fillRect(level(weight) * width, 0, 1, height / 2);
    context.fillText(`${100 * weight} %`, level(weight) * width - 10, height - 4);
  }
}

// The list of heads, in the order of what they look at, and the stages

function describeHeads() {
  const { shares, order, names } = stages[shown.stage];
  const mean = shares[0].map((_, i) => shares.reduce((sum, head) => sum + head[i], 0) / shares.length);
  const entries = [[MEAN, "all heads, mean", "", mean], ...order.map((head) =>
    [head, `head ${head}: ${headName(head)}`, percent(names[head][1]), shares[head]])];
  element("heads").replaceChildren(...entries.map(([head, name, share, looks]) => {
    const button = document.createElement("button");
    const label = document.createElement("span");
    const number = document.createElement("span");
    label.textContent = name;
    number.textContent = share;
    button.append(label, number);
    button.onclick = () => choose({ head });
    button.dataset.head = head;
    const largest = things.map((thing, i) => [looks[i], thing]).filter(([part]) => part >= 0.005);
    largest.sort((a, b) => b[0] - a[0]);
    button.dataset.shares = largest.map(([part, thing]) => `${thing} ${percent(part)}`).join(", ");
    button.setAttribute("role", "radio");
    return button;
  }));
}

function markChosen() {
  for (const button of element("heads").children) {
    const chosen = button.dataset.head === String(shown.head);
    button.setAttribute("aria-checked", chosen);
    button.tabIndex = chosen ? 0 : -1;
    if (chosen) element("shares").textContent = `Over the whole replay: ${button.dataset.shares}.`;
  }
  for (const [i, button] of [...element("stage-buttons").children].entries()) {
    button.setAttribute("aria-pressed", i === shown.stage);
  }
}

function choose(change) {
  const stage = shown.stage;
  Object.assign(shown, change);
  if (shown.stage !== stage) describeHeads();
  markChosen();
  update();
}

function nextHead(step) {
  const all = [MEAN, ...stages[shown.stage].order];
  choose({ head: all[(all.indexOf(shown.head) + step + all.length) % all.length] });
}

// Time

function seek(i) {
  edited = null;
  shown.frame = Math.max(0, Math.min(frames.length - 1, i));
  update();
}

const jumpTo = (name) => document.querySelector(`[data-event=${name}]`);

function jump(name, step) {
  if (playing) pause();
  for (let i = shown.frame + step; i >= 0 && i < frames.length; i += step) if (eventAt(i, name)) return seek(i);
  const none = `no ${step > 0 ? "further" : "earlier"} ${jumpTo(name).textContent}`;
  element("status").textContent = `${element("status").textContent.split(" · no ")[0]} · ${none}`;
  say(none);
}

function play() {
  if (shown.frame === frames.length - 1) seek(0);
  let due = performance.now();
  const tick = (now) => {
    const period = 1000 / element("speed").value;
    const steps = Math.floor((now - due) / period);
    if (steps > 0) {
      due += steps * period;
      if (now - due > 1000) due = now; // the tab was hidden
      seek(shown.frame + Math.min(steps, 5));
      if (shown.frame === frames.length - 1) return pause();
    }
    playing = requestAnimationFrame(tick);
  };
  playing = requestAnimationFrame(tick);
  element("play").textContent = "Pause";
}

function pause() {
  cancelAnimationFrame(playing);
  playing = null;
  element("play").textContent = "Play";
  update();
}

const toggle = () => (playing ? pause() : play());

// The address keeps what is shown

function recall() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const number = (name, high, otherwise) => {
    const value = Number.parseInt(wanted.get(name), 10);
    return value >= 0 && value <= high ? value : otherwise;
  };
  edited = null;
  shown.frame = number("frame", frames.length - 1, shown.frame);
  shown.head = number("head", config.n_head - 1, MEAN);
  shown.stage = number("stage", stages.length - 1, shown.stage);
  describeHeads();
  markChosen();
  update();
}

// Looking at a cell, and editing

function cellAt(event) {
  const box = element("page").getBoundingClientRect();
  const { w, h } = sizes();
  const inside = (value, high) => Math.max(0, Math.min(high, Math.floor(value)));
  return {
    row: inside((event.clientY - box.top) / h, game.rows - 1),
    column: inside((event.clientX - box.left) / w, WIDTH - 1),
  };
}

function describeCell() {
  if (!cursor) return (element("cell").textContent = "Point at a character to see what each head gives it.");
  const t = cursor.row * game.columns + cursor.column;
  const character = game.characters[pageOf(current())[t]];
  const heads = answer.attention.map((head, i) => [head[t], i]).filter(([weight]) => weight >= 0.0005);
  heads.sort((a, b) => b[0] - a[0]);
  const weights = heads.map(([weight, i]) => `head ${i} ${percent(weight)}`).join(", ");
  const mean = answer.attention.reduce((sum, head) => sum + head[t], 0) / answer.attention.length;
  let text = `Row ${cursor.row}, column ${cursor.column}: ${character === " " ? "empty" : character}. `;
  text += weights ? `Weights: ${weights}; ` : "Every head gives it less than 0.05 %; ";
  text += `mean ${(100 * mean).toFixed(2)} %.`;
  element("cell").textContent = text + describedToo(cursor);
}

function look(cell) {
  cursor = cell;
  describeCell();
  drawHeat();
}

// Wiring

// Let the page fill the width of the board, but with characters that are not too large, and not much higher than a screen.
function fit() {
  const page = element("page");
  const room = element("board").clientWidth;
  const largest = Math.min(WIDTH < 45 ? 26 : 18, Math.max(6, 560 / game.rows));
  page.parentElement.style.fontSize = "100px";
  const perPixel = page.parentElement.getBoundingClientRect().width / 100;
  page.parentElement.style.fontSize = Math.min(largest, Math.floor((100 * room) / perPixel) / 100) + "px";
}

function redraw() {
  fit();
  drawScale();
  update();
}

// What each key does. The argument is -1 with Shift, otherwise 1.
const keys = {
  " ": toggle,
  arrowleft: () => step(-1),
  arrowright: () => step(1),
  home: () => seek(0),
  end: () => seek(frames.length - 1),
  h: nextHead,
  m: () => element("map").click(),
  escape: undo,
};
const arrows = ["arrowleft", "arrowright", "arrowup", "arrowdown"];
// The keys that a control with the focus keeps for itself, by its type.
const own = {
  range: [...arrows, "home", "end"],
  radio: arrows,
  checkbox: [" "],
  submit: [" "],
  "select-one": [...arrows, " ", "home", "end"],
};

function step(by) {
  if (playing) pause();
  seek(shown.frame + by);
}

function undo() {
  edited = null;
  update();
}

// Whether a key belongs to the browser. AltGr, which Windows reports as Ctrl and Alt, only makes other characters.
const withModifier = (event) =>
  (event.ctrlKey || event.metaKey || event.altKey) && !event.getModifierState("AltGraph");

function keyOnPage(event) {
  if (withModifier(event)) return;
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const { row, column } = cursor ?? firstCell();
  const done = typed(event);
  if (event.key === "Enter") edit({ row, column });
  else if (move) {
    look({
      row: Math.max(0, Math.min(game.rows - 1, row + move[0])),
      column: Math.max(0, Math.min(WIDTH - 1, column + move[1])),
    });
    say(element("cell").textContent);
  } else if (!done) return;
  event.preventDefault();
  event.stopPropagation();
}

function start() {
  begin();
  element("about").textContent = data.about;
  document.title = `What the model sees: ${data.name}`;
  element("page").style.width = `${WIDTH}ch`;
  for (let row = 0; row < game.rows; row++) element("page").append(document.createElement("span"));
  element("answers").classList.toggle("many", manyActions);
  for (const name of actions) {
    const row = element("actions").insertRow();
    const meter = document.createElement("meter");
    row.insertCell();
    row.insertCell().append(meter);
    row.insertCell();
    meter.setAttribute("aria-label", `probability of ${name}`);
  }
  if (stages.length > 1) {
    element("stages").hidden = false;
    element("stage-buttons").append(...stages.map(({ label }, stage) => {
      const button = document.createElement("button");
      Object.assign(button, { textContent: label, onclick: () => choose({ stage }) });
      return button;
    }));
  }
  element("slider").max = frames.length - 1;
  element("slider").oninput = (event) => {
    if (playing) pause();
    seek(Number(event.target.value));
  };
  element("play").onclick = toggle;
  element("back").onclick = () => step(-1);
  element("forward").onclick = () => step(1);
  element("undo").onclick = undo;
  for (const button of document.querySelectorAll(`#controls .${document.body.className} [data-event]`)) {
    keys[button.dataset.key] = (way) => jump(button.dataset.event, way);
    button.onclick = () => jump(button.dataset.event, 1);
    button.disabled = !frames.some((_, i) => eventAt(i, button.dataset.event));
  }
  element("page").onpointermove = (event) => held || look(cellAt(event));
  element("page").onpointerleave = () => held || document.activeElement === element("page") || look(null);
  element("page").onclick = (event) => {
    look(cellAt(event)); // because a finger, unlike a mouse, has not moved there before
    edit(cellAt(event));
  };
  element("page").onkeydown = keyOnPage;
  element("heads").onkeydown = (event) => {
    const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (!by || withModifier(event)) return;
    nextHead(by);
    element("heads").querySelector("[aria-checked=true]").focus();
    event.preventDefault();
    event.stopPropagation();
  };
  element("chart").onpointerdown = (event) => {
    if (playing) pause();
    seek(Math.round(((event.offsetX - MARGIN) / (element("chart").clientWidth - 2 * MARGIN)) * (frames.length - 1)));
  };
  document.onkeydown = (event) => {
    const key = event.key.toLowerCase();
    const kept = event.target.type === "text" ? key !== "escape" : own[event.target.type]?.includes(key);
    if (kept || withModifier(event) || !keys[key]) return;
    keys[key](event.shiftKey ? -1 : 1);
    event.preventDefault();
  };
  addEventListener("hashchange", recall);
  dark.addEventListener("change", redraw);
  recall();
  let seen = 0; // Only the width counts, because redraw() itself changes the height with the text that it writes.
  new ResizeObserver(([{ contentRect: { width } }]) => {
    if (width === seen) return;
    seen = width;
    redraw();
  }).observe(element("board"));
}
