// What page.js shows of Breakout, whose pages are drawn anew from where the ball, the paddle and the bricks are.
"use strict";

const [X, Y, PADDLE, ACTION, SCORE, LIVES] = [0, 1, 2, 3, 4, 5]; // of a frame
const SCORE_NAME = "score";
const bricksOf = unpackBricks();
let mapTask = 0; // the number of the latest map; an earlier one that is still being computed stops
let mapped = null; // [row][column] of {best, probability}: the map, as far as it is computed

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

function partsOf(line, row) {
  return line.match(/#+|=+|O|[|_]+| +/g).map((text) => {
    if ("|_".includes(text[0])) return { text, name: "brick", colour: `var(--b${(row - game.brick_top) % 7})` };
    return { text, name: { "#": "wall", "=": "paddle", O: "ball" }[text[0]] };
  });
}

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

function headName(head) {
  const { names, shares } = stages[shown.stage];
  const [name] = names[head];
  if (name !== "paddle") return name;
  const endOf = (side) => Math.round(100 * shares[head][things.indexOf(`paddle's ${side} end`)]);
  return `${name}, ends ${endOf("left")} + ${endOf("right")} %`;
}

function describedToo({ row, column }) {
  const best = mapped?.[row]?.[column]?.best;
  return best === undefined ? "" : ` With the ball here: ${actions[best]}.`;
}

function firstCell() {
  const { x, y } = current();
  return { row: y, column: x };
}

const typed = () => false;

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

function begin() {
  element("map").disabled = element("map-label").hidden = config.n_layer > 1; // which would take seconds for each cell
  element("map").onchange = update;
}

// The map shows the most probable action with the ball in each cell. It is computed a little at a time, so that the
// page stays alive.

function forget() {
  mapped = null;
  mapTask++;
}

function complete() {
  if (element("map").checked && !playing) startMap();
}

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

function drawOver(context, w, h) {
  if (!mapped) return;
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
