// The rules of Breakout, in the order of Games.step in breakout_ascii.py, and its page.
//
// A state is {x, y, dx, dy, paddle, lives, score, elapsed, bricks, serves}: the cell of the ball and its cells per step,
// the column of the paddle's left end, the wall as text of 0 and 1, row by row, and for each life the serve [x, dx,
// paddle]. A state never changes; each step makes another. `game` holds the constants of breakout_ascii.py.
"use strict";

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const wholeWall = () => "1".repeat(game.brick_rows * game.brick_columns);
const isOver = (state) => state.lives === 0 || !state.bricks.includes("1") || state.elapsed >= game.max_episode_steps;

// Return the state at the beginning of a game.
function newGame(serves, bricks) {
  const state = { dx: 0, dy: 0, lives: game.lives, score: 0, elapsed: 0, bricks, serves };
  serve(state);
  return state;
}

// Return serves with random directions, as a game that starts from the whole wall has them.
function randomServes() {
  const direction = () => (Math.random() < 0.5 ? -1 : 1);
  return Array.from({ length: game.lives }, () => [game.serve_x, direction(), game.paddle_start]);
}

// Return the state after a step in which the paddle moves by an action.
function advance(before, action) {
  const state = { ...before, elapsed: before.elapsed + 1 };
  state.paddle = clamp(before.paddle + game.paddle_moves[action], 1, game.paddle_max);
  if (state.elapsed % game.ball_interval === 0) {
    state.x += state.dx;
    state.y += state.dy;
  }
  bounceOffWalls(state);
  if (state.y >= game.rows - 1) loseBall(state, before);
  bounceOffPaddle(state);
  breakBrick(state);
  return state;
}

function bounceOffWalls(state) {
  const right = game.columns - 2;
  if (state.x <= 0) Object.assign(state, { x: 0, dx: 1 });
  else if (state.x >= right) Object.assign(state, { x: right, dx: -1 });
  if (state.y <= 0) Object.assign(state, { y: 0, dy: 1 });
}

// A ball at the floor costs a life, and the next is served. The last ball stays where it was before the step.
function loseBall(state, before) {
  state.lives -= 1;
  state.x = before.x;
  state.y = before.y;
  if (state.lives > 0) serve(state);
}

function serve(state) {
  [state.x, state.dx, state.paddle] = state.serves[game.lives - state.lives];
  state.y = game.serve_row;
  state.dy = -1;
}

function bounceOffPaddle(state) {
  const offset = state.x - state.paddle;
  if (state.y !== game.paddle_row || offset < 0 || offset >= game.paddle.length || state.lives === 0) return;
  state.y = game.serve_row;
  state.dy = -1;
  state.dx = offset <= game.paddle_middle ? -1 : 1;
}

function breakBrick(state) {
  const i = brickAt(state.y, state.x);
  if (state.bricks[i] !== "1") return;
  state.bricks = state.bricks.slice(0, i) + "0" + state.bricks.slice(i + 1);
  state.dy = -state.dy;
  state.score += game.brick_points + (state.bricks.includes("1") ? 0 : game.clear_points);
}

// The index of the brick in a cell, or -1
function brickAt(row, column) {
  const i = row - game.brick_top;
  const j = Math.floor((column - game.brick_left) / game.brick.length);
  return i >= 0 && i < game.brick_rows && j >= 0 && j < game.brick_columns ? i * game.brick_columns + j : -1;
}

// Draw the page of a state; one whose x is null has no ball. Returns the characters as indices in game.characters.
function pageOf({ x, y, paddle, bricks }) {
  const solid = "#".repeat(game.columns - 1);
  const hollow = "#" + " ".repeat(game.columns - 3) + "#";
  const lines = Array.from({ length: game.rows }, (_, row) =>
    [...(row === 0 || row === game.rows - 1 ? solid : hollow), "\n"]);
  for (let i = 0; i < bricks.length; i++) {
    const row = game.brick_top + Math.floor(i / game.brick_columns);
    const column = game.brick_left + game.brick.length * (i % game.brick_columns);
    if (bricks[i] === "1") lines[row].splice(column, game.brick.length, ...game.brick);
  }
  lines[game.paddle_row].splice(paddle, game.paddle.length, ...game.paddle);
  if (x !== null) lines[y][x] = "O";
  return Uint8Array.from(lines.flat(), (character) => game.characters.indexOf(character));
}
