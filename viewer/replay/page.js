// The page around gpt.js. It shows a recorded game, the model's answer in each step, and its answer to an edited page.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { game, frames, stages, config, things, actions } = data;
const [X, Y, PADDLE, ACTION, SCORE, LIVES] = [0, 1, 2, 3, 4, 5]; // of a frame
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
const percent = (share) => (share >= 0.0995 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)) + " %";

const models = stages.map((stage) => new GPT(config, unpack(stage.weights), game));
const bricksOf = unpackBricks();
const shown = { frame: 0, head: MEAN, stage: stages.length - 1 };
let edited = null; // the state of the page once it has been edited, as `stateOf` returns one
let cursor = null; // the cell {row, column} that is described
let playing = null; // the number of the next animation frame, while the replay plays
let answer = null; // what the model read last
let answered = null; // the stage and the page that `answer` belongs to
let mapTask = 0; // the number of the latest map; an earlier one that is still being computed stops
let mapped = null; // [row][column] of {best, probability}: the map, as far as it is computed
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

// Return the wall of each frame, a string of 0 and 1, row by row. A frame without an entry in data.walls has the wall
// of the frame before.
function unpackBricks() {
  const walls = [];
  for (let i = 0; i < frames.length; i++) walls.push(data.walls[i] ?? walls[i - 1]);
  return walls;
}

function stateOf(i) {
  const frame = frames[i];
  return { x: frame[X], y: frame[Y], paddle: frame[PADDLE], bricks: bricksOf[i] };
}

const current = () => edited ?? stateOf(shown.frame);

// Draw a page as breakout_ascii.py does. Returns its characters as indices in game.characters.
function pageOf({ x, y, paddle, bricks }) {
  const lines = Array.from({ length: game.rows }, (_, row) =>
    [...(row === 0 || row === game.rows - 1 ? "#".repeat(WIDTH) : "#" + " ".repeat(WIDTH - 2) + "#"), "\n"]);
  for (let i = 0; i < bricks.length; i++) {
    const row = game.brick_top + Math.floor(i / game.brick_columns);
    const column = game.brick_left + game.brick.length * (i % game.brick_columns);
    if (bricks[i] === "1") lines[row].splice(column, game.brick.length, ...game.brick);
  }
  lines[game.paddle_row].splice(paddle, game.paddle.length, ...game.paddle);
  if (x !== null) lines[y][x] = "O";
  return Uint8Array.from(lines.flat(), (character) => game.characters.indexOf(character));
}

const textOf = (page) => Array.from(page, (character) => game.characters[character]).join("");

// The index of the brick in a cell, or -1
function brickAt(row, column) {
  const i = row - game.brick_top;
  const j = Math.floor((column - game.brick_left) / game.brick.length);
  return i >= 0 && i < game.brick_rows && j >= 0 && j < game.brick_columns ? i * game.brick_columns + j : -1;
}

// Return whether an event happened between frame i and the one before, for the buttons that jump to it.
function eventAt(i, name) {
  const [before, now] = [frames[i - 1], frames[i]];
  if (!before || before[ACTION] < 0) return false; // a new game
  if (name === "point") return now[SCORE] > before[SCORE];
  if (name === "lost") return now[LIVES] < before[LIVES];
  // A returned ball is in the row above the paddle. A frame before it was there, too, in another column, or in the
  // paddle's row, where a slow ball waits.
  const moved = now[X] !== before[X] || before[Y] !== now[Y];
  return now[LIVES] === before[LIVES] && now[Y] === game.serve_row && before[Y] >= game.serve_row && moved;
}

// Drawing

function update() {
  const page = pageOf(current());
  const asked = `${shown.stage} ${textOf(page)}`;
  // Nothing is computed when another head is chosen, which shows another part of the same answer.
  if (asked !== answered) answer = models[shown.stage].read(page);
  answered = asked;
  mapped = null;
  mapTask++;
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
  element("status").textContent = `${step} · score ${frame[SCORE]} · lives ${frame[LIVES]}${end}${edit}`;
  element("slider").value = shown.frame;
  element("slider").setAttribute("aria-valuetext", `step ${shown.frame}`);
  element("undo").disabled = !edited;
  clearTimeout(later);
  if (!playing) later = setTimeout(settle, 300);
  if (element("map").checked && !playing) startMap();
}

// The number of the game that a frame belongs to
const gameOf = (i) => 1 + frames.slice(0, i).filter((frame) => frame[ACTION] === GAME_OVER).length;

// Update the address and tell a screen reader what is shown. This is done only once nothing has moved for a while,
// because browsers limit how often the address may change, and a screen reader needs time to speak.
function settle() {
  const place = `#frame=${shown.frame}&head=${shown.head}&stage=${shown.stage}`;
  if (location.hash !== place) history.replaceState(null, "", place);
  const probabilities = actions.map((name, i) => `${name} ${answer.probabilities[i].toFixed(2)}`);
  say(`${element("status").textContent}. ${probabilities.join(", ")}`);
}

function say(text) {
  element("said").textContent = text;
}

// Show the text of the page, in spans of one colour. Lines that have not changed are left alone.
function drawPage() {
  const lines = textOf(pageOf(current())).split("\n");
  for (let row = 0; row < game.rows; row++) {
    const line = element("page").children[row];
    if (line.dataset.text === lines[row]) continue;
    line.dataset.text = lines[row];
    line.replaceChildren(...lines[row].match(/#+|=+|O|[|_]+| +/g).map((part) => {
      const span = document.createElement("span");
      span.textContent = part;
      if ("|_".includes(part[0])) span.style.color = `var(--b${(row - game.brick_top) % 7})`;
      else span.className = { "#": "wall", "=": "paddle", O: "ball" }[part[0]] ?? "";
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
  if (mapped) drawMap(context, w, h);
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
    const remark = wasTaken ? " taken" : " most probable";
    element("actions").rows[i].className = chosen ? "chosen" : "";
    label.textContent = (chosen ? "▶ " : "") + name;
    bar.firstChild.value = answer.probabilities[i];
    number.textContent = answer.probabilities[i].toFixed(3) + (chosen ? remark : "");
  });
  element("value").textContent = answer.value.toFixed(3);
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
    ["score", frames.map((frame) => frame[SCORE]), "--accent", [], 4],
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
    for (const value of new Set([low, high])) {
      const below = value === high && high > low ? 12 : 0; // pixels
      context.fillText(Number.isInteger(value) ? value : value.toFixed(1), labelAt, up(value) + below);
    }
  }
  context.setLineDash([]);
  context.strokeStyle = style("--ink");
  context.lineWidth = 1;
  context.strokeRect(place(shown.frame), top, 0, bottom - top);
  const now = `score ${frames[shown.frame][SCORE]}, value ${values[shown.frame].toFixed(2)}`;
  canvas.setAttribute("aria-label", `Score and value over ${n} steps; now ${now}`);
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
    context.fillRect(level(weight) * width, 0, 1, height / 2);
    context.fillText(`${100 * weight} %`, level(weight) * width - 10, height - 4);
  }
}

// The list of heads, in the order of what they look at, and the stages

function describeHeads() {
  const { shares, order, names } = stages[shown.stage];
  const mean = shares[0].map((_, i) => shares.reduce((sum, head) => sum + head[i], 0) / shares.length);
  const endOf = (head, side) => Math.round(100 * shares[head][things.indexOf(`paddle's ${side} end`)]);
  const ends = (head) => `${endOf(head, "left")} + ${endOf(head, "right")}`;
  const nameOf = (head) => names[head][0] + (names[head][0] === "paddle" ? `, ends ${ends(head)} %` : "");
  const entries = [[MEAN, "all heads, mean", "", mean], ...order.map((head) =>
    [head, `head ${head}: ${nameOf(head)}`, percent(names[head][1]), shares[head]])];
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

function jump(name, step) {
  if (playing) pause();
  for (let i = shown.frame + step; i >= 0 && i < frames.length; i += step) if (eventAt(i, name)) return seek(i);
  const none = `no ${step > 0 ? "further" : "earlier"} ${name === "lost" ? "lost ball" : name}`;
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
  const best = mapped?.[cursor.row]?.[cursor.column]?.best;
  let text = `Row ${cursor.row}, column ${cursor.column}: ${character === " " ? "empty" : character}. `;
  text += weights ? `Weights: ${weights}; ` : "Every head gives it less than 0.05 %; ";
  text += `mean ${(100 * mean).toFixed(2)} %.`;
  if (best !== undefined) text += ` With the ball here: ${actions[best]}.`;
  element("cell").textContent = text;
}

function look(cell) {
  cursor = cell;
  describeCell();
  drawHeat();
}

function edit({ row, column }) {
  const tool = document.querySelector("input[name=tool]:checked").value;
  const state = { ...current() };
  if (tool === "look") return say(element("cell").textContent);
  if (playing) pause();
  if (tool === "ball") Object.assign(state, { x: column, y: Math.min(row, game.paddle_row) });
  if (tool === "paddle") state.paddle = Math.max(1, Math.min(game.paddle_max, column - game.paddle_middle));
  if (tool === "brick") {
    const i = brickAt(row, column);
    if (i < 0) return;
    state.bricks = state.bricks.slice(0, i) + (state.bricks[i] === "1" ? "0" : "1") + state.bricks.slice(i + 1);
  }
  edited = state;
  update();
}

// The map shows the most probable action with the ball in each cell. It is computed a little at a time, so that the
// page stays alive.

function startMap() {
  const task = ++mapTask;
  const model = models[shown.stage];
  const ball = game.characters.indexOf("O");
  const cells = [];
  const sums = model.sum(pageOf({ ...current(), x: null }));
  mapped = Array.from({ length: game.rows }, () => []);
  for (let row = 1; row <= game.paddle_row; row++) {
    for (let column = 1; column < WIDTH - 1; column++) cells.push([row, column]);
  }
  const some = () => {
    if (task !== mapTask) return;
    const until = performance.now() + 50;
    while (cells.length && performance.now() < until) {
      const [row, column] = cells.pop();
      const { probabilities } = model.readChanged(sums, row * game.columns + column, ball);
      const best = probabilities.indexOf(Math.max(...probabilities));
      mapped[row][column] = { best, probability: probabilities[best] };
    }
    drawHeat();
    if (cells.length) setTimeout(some);
    else describeCell();
  };
  setTimeout(some);
}

function drawMap(context, w, h) {
  const signs = ["·", "◂", "▸"];
  const papers = [null, colour(0.3), colour(1)];
  const ink = style("--ink");
  context.clearRect(0, 0, WIDTH * w, game.rows * h);
  context.font = `${h * 0.8}px sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  mapped.forEach((line, row) => line.forEach(({ best, probability }, column) => {
    if (papers[best]) {
      context.fillStyle = papers[best];
      context.fillRect(column * w, row * h, w + 0.5, h + 0.5);
    }
    context.globalAlpha = 0.7 + 0.3 * probability ** 2;
    context.fillStyle = ink;
    context.fillText(signs[best], (column + 0.5) * w, (row + 0.5) * h);
    context.globalAlpha = 1;
  }));
}

// Wiring

function fit() {
  const page = element("page");
  const room = element("board").clientWidth;
  page.parentElement.style.fontSize = "100px";
  const perPixel = page.parentElement.getBoundingClientRect().width / 100;
  page.parentElement.style.fontSize = Math.min(18, Math.floor((100 * room) / perPixel) / 100) + "px";
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
  p: (way) => jump("point", way),
  r: (way) => jump("return", way),
  l: (way) => jump("lost", way),
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

const withModifier = (event) => event.ctrlKey || event.metaKey || event.altKey; // these keys belong to the browser

function keyOnPage(event) {
  if (withModifier(event)) return;
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const { row, column } = cursor ?? { row: current().y, column: current().x };
  if (event.key === "Enter") edit({ row, column });
  else if (move) {
    look({
      row: Math.max(0, Math.min(game.rows - 1, row + move[0])),
      column: Math.max(0, Math.min(WIDTH - 1, column + move[1])),
    });
    say(element("cell").textContent);
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

function start() {
  element("about").textContent = data.about;
  document.title = `What the model sees: ${data.name}`;
  element("page").style.width = `${WIDTH}ch`;
  for (let row = 0; row < game.rows; row++) element("page").append(document.createElement("span"));
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
  element("map").disabled = element("map-label").hidden = config.n_layer > 1; // which would take seconds for each cell
  element("slider").max = frames.length - 1;
  element("slider").oninput = (event) => {
    if (playing) pause();
    seek(Number(event.target.value));
  };
  element("play").onclick = toggle;
  element("back").onclick = () => step(-1);
  element("forward").onclick = () => step(1);
  element("undo").onclick = undo;
  element("map").onchange = update;
  for (const button of document.querySelectorAll("[data-event]")) {
    button.onclick = () => jump(button.dataset.event, 1);
    button.disabled = !frames.some((_, i) => eventAt(i, button.dataset.event));
  }
  element("page").onpointermove = (event) => look(cellAt(event));
  element("page").onpointerleave = () => document.activeElement !== element("page") && look(null);
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
    if (own[event.target.type]?.includes(key) || withModifier(event) || !keys[key]) return;
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

start();
