// What the page shows of Breakout, whose games are played again from serves and actions by the rules in game.js.
"use strict";

const SCORE_NAME = "score";
const LIVE = true;

const frameOf = (state) => ({
  state, action: isOver(state) ? GAME_OVER : null, score: state.score, lives: state.lives,
});

const howItEnded = ({ state }) => (state.bricks.includes("1") ? "the game is over" : "the wall is cleared");

function recordingOf({ games, values }) {
  const frames = [];
  for (const { serves, actions, end } of games) {
    let state = newGame(serves, wholeWall());
    for (const action of actions) {
      frames.push({ ...frameOf(state), action: Number(action) });
      state = advance(state, Number(action));
    }
    frames.push({ ...frameOf(state), action: end });
  }
  frames.forEach((frame, i) => (frame.value = values[i]));
  return frames;
}

const NUMBERS = ["x", "y", "dx", "dy", "paddle", "lives", "score", "elapsed"];

const written = (state) =>
  [...NUMBERS.map((name) => state[name]), BigInt("0b" + state.bricks).toString(36)].join(".");

// Whatever an address holds, the state becomes one that an edit can make.
function unwritten(text, base) {
  const words = text.split(".");
  const state = { ...base.state };
  NUMBERS.forEach((name, i) => (state[name] = Number(words[i])));
  const wall = words[8] ?? "";
  if (words.length !== 9 || !/^[0-9a-z]{1,40}$/.test(wall)) return null;
  if (NUMBERS.some((name) => !Number.isInteger(state[name]))) return null;
  const bricks = [...wall].reduce((number, digit) => number * 36n + BigInt(Number.parseInt(digit, 36)), 0n).toString(2);
  state.bricks = bricks.padStart(base.state.bricks.length, "0");
  if (state.bricks.length !== base.state.bricks.length || state.lives > game.lives || state.lives < 0) return null;
  if (Math.abs(state.dx) !== 1 || Math.abs(state.dy) !== 1 || state.score < 0 || state.elapsed < 0) return null;
  const possible = legal(state);
  return inBrick(possible) ? null : { ...frameOf(possible), edited: true };
}

// Return the state with the ball and the paddle where the game could have them: the ball not in the paddle nor beyond a
// wall, in which it may be while it turns round. Where it may not be in a brick is up to the caller.
function legal(state) {
  const paddle = clamp(state.paddle, 1, game.paddle_max);
  const right = game.columns - 2;
  const x = state.x < 0 || state.x > right ? clamp(state.x, 1, right - 1) : state.x;
  const onPaddle = x >= paddle && x < paddle + game.paddle.length && state.lives > 0;
  return { ...state, paddle, x, y: clamp(state.y, 0, onPaddle ? game.serve_row : game.paddle_row) };
}

const inBrick = ({ x, y, bricks }) => bricks[brickAt(y, x)] === "1";

function partsOf(line, row) {
  return line.match(/#+|=+|O|[|_]+| +/g).map((text) => {
    if ("|_".includes(text[0])) return { text, name: "brick", colour: `var(--b${(row - game.brick_top) % 7})` };
    return { text, name: { "#": "wall", "=": "paddle", O: "ball" }[text[0]] };
  });
}

// Return whether an event happened between frame i and the one before, for the buttons that jump to it.
function eventAt(i, name) {
  const [before, now] = [line[i - 1], line[i]];
  if (!before || before.action === null || before.action < 0 || now.edited) return false; // a new game, or an edit
  if (name === "point") return now.score > before.score;
  if (name === "lost") return now.lives < before.lives;
  // A returned ball is in the row above the paddle. A frame before it was there, too, in another column, or in the
  // paddle's row, where a slow ball waits.
  const [a, b] = [before.state, now.state];
  return now.lives === before.lives && b.y === game.serve_row && a.y >= game.serve_row && (b.x !== a.x || b.y !== a.y);
}

function captionOfHead() {
  return `This head looks at the ${stages[shown.stage].names[shown.head][0]}`;
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
const tool = () => document.querySelector("input[name=tool]:checked").value;

function edit({ row, column }) {
  const state = current();
  if (tool() === "look") return say(element("cell").textContent);
  if (tool() === "ball") moveBall({ row, column });
  if (tool() === "paddle") change(legal({ ...state, paddle: column - game.paddle_middle }));
  if (tool() === "brick") switchBrick(brickAt(row, column));
}

function switchBrick(i) {
  const state = current();
  if (i < 0) return refuse("bricks go where the wall was");
  if (i === brickAt(state.y, state.x) && state.bricks[i] === "0") return refuse("the ball is there");
  const brick = state.bricks[i] === "1" ? "0" : "1";
  change({ ...state, bricks: state.bricks.slice(0, i) + brick + state.bricks.slice(i + 1) });
}

function moveBall({ row, column }, again) {
  const state = legal({ ...current(), x: clamp(column, 1, game.columns - 3), y: Math.max(1, row) });
  if (inBrick(state)) return again || refuse("a brick is there");
  change(state, again);
}

// Dragging: the ball, the tip of its arrow, or the paddle. A drag is one edit, however far it goes.
function grab({ row, column }) {
  const state = current();
  const tip = tipOf(state);
  const near = (cell, far) => Math.abs(cell.row - row) <= far && Math.abs(cell.column - column) <= 2 * far;
  let made = null; // the frame that this drag has edited, which is no longer there after `undo`, or after a step
  const drag = (move) => (cell) => {
    const before = line[shown.frame];
    move(cell, before === made);
    if (line[shown.frame] !== before) made = line[shown.frame];
  };
  const far = sizes().w < 7 ? 1 : 0; // on a small screen a finger covers several characters
  if (near({ row: state.y, column: state.x }, playing ? 3 : far)) return drag(moveBall); // it flies, and is hard to meet
  if (!playing && near(tip, Math.max(far, 0.5))) return drag(aim);
  if (Math.abs(row - game.paddle_row) <= far && column >= state.paddle && column < state.paddle + game.paddle.length) {
    const hold = column - state.paddle;
    return drag((cell, again) => change(legal({ ...current(), paddle: cell.column - hold }), again));
  }
  return null;
}

// The ball's arrow ends two cells from it.
const tipOf = ({ x, y, dx, dy }) => ({ row: y + 2 * dy, column: x + 2 * dx });

const UNSEEN = "the page does not show its direction";

// Let the ball fly towards a cell.
function aim({ row, column }, again) {
  const state = current();
  const dx = Math.sign(column - state.x) || state.dx;
  const dy = Math.sign(row - state.y) || state.dy;
  if (dx !== state.dx || dy !== state.dy) change({ ...state, dx, dy }, again, UNSEEN);
}

// Turn the ball by a quarter, clockwise or back.
function turn(way) {
  const { dx, dy } = current();
  change({ ...current(), dx: -dy * way, dy: dx * way }, false, UNSEEN);
}

function begin() {
  element("map").disabled = element("map-label").hidden = config.n_layer > 1; // which would take seconds for each cell
  element("map").onchange = () => {
    mapped = mapOf = null;
    hideCaptions();
    element("map-legend").hidden = !element("map").checked;
    element("map-state").textContent = " computing …";
    update();
  };
  element("turn").onclick = () => turn(1);
  Object.assign(keys, { m: () => element("map").click(), d: turn });
  beginLive();
}

// The map shows the most probable action with the ball in each cell. It is computed a little at a time, so that the page
// stays alive, and the map before is shown until the new one is complete.

let mapped = null; // [row][column] of {best, sure}; sure is 0 for a guess and 1 for certainty
let mapOf = null; // what the latest map belongs to
let mapping = false; // whether one is being computed

function complete() {
  showAgreement();
  if (element("map").checked && !mapping && mapOf !== answered) computeMap();
}

function computeMap() {
  const belongsTo = answered;
  const model = models[shown.stage];
  const ball = game.characters.indexOf("O");
  const sums = model.sum(pageOf({ ...current(), x: null }));
  const map = Array.from({ length: game.rows }, () => []);
  const cells = [];
  for (let row = 1; row <= game.paddle_row; row++) {
    for (let column = 1; column < WIDTH - 1; column++) cells.push([row, column]);
  }
  mapping = true;
  const some = () => {
    const until = performance.now() + (playing ? 10 : 50);
    while (cells.length && performance.now() < until) {
      const [row, column] = cells.pop();
      const { probabilities } = model.readChanged(sums, row * game.columns + column, ball);
      const best = largest(probabilities);
      const guess = 1 / actions.length;
      map[row][column] = { best, sure: (probabilities[best] - guess) / (1 - guess) };
    }
    if (cells.length && element("map").checked) return setTimeout(some);
    mapping = false;
    if (!element("map").checked) return;
    mapped = map;
    mapOf = belongsTo;
    element("map-state").textContent = "";
    drawHeat();
    if (!playing) describeCell();
    complete();
  };
  setTimeout(some);
}

function drawOver(context, w, h) {
  if (mapped && element("map").checked) drawMap(context, w, h);
  if (!playing) drawArrow(context, w, h);
}

function drawMap(context, w, h) {
  const signs = ["", "◂", "▸"];
  const papers = ["--stay", "--left", "--right"].map(style);
  const ink = style("--faint");
  context.clearRect(0, 0, WIDTH * w, game.rows * h);
  context.font = `${h * 0.6}px sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  mapped.forEach((cells, row) => cells.forEach(({ best, sure }, column) => {
    context.globalAlpha = (0.1 + 0.9 * sure) * (playing || mapOf === answered ? 1 : 0.4); // paler while it is renewed
    context.fillStyle = papers[best];
    context.fillRect(column * w, row * h, w + 0.3, h + 0.3);
    context.fillStyle = ink;
    if (w > 6 && (row + column) % 4 === 0) context.fillText(signs[best], (column + 0.5) * w, (row + 0.5) * h);
  }));
  context.globalAlpha = 1;
}

// Show where the ball flies, which is not on the page.
function drawArrow(context, w, h) {
  const { x, y, dx, dy, lives } = current();
  if (lives === 0) return;
  const [fromX, fromY] = [(x + 0.5) * w, (y + 0.5) * h];
  const [toX, toY] = [fromX + 2 * dx * w, fromY + 2 * dy * h];
  context.strokeStyle = style("--accent");
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(fromX + 0.7 * dx * w, fromY + 0.7 * dy * h);
  context.lineTo(toX, toY);
  context.moveTo(toX - 0.9 * dx * w, toY);
  context.lineTo(toX, toY);
  context.lineTo(toX, toY - 0.9 * dy * h);
  context.stroke();
}
