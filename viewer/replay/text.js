// What page.js shows of any game but Breakout, whose pages are kept as text, and edited character by character.
"use strict";

const SCORE_NAME = "return";
const LIVE = false; // because the rules of other games are not here
const hand = null;
const moveAsDigit = () => "";
const playedOn = () => null;
const playOneStep = () => false;

const frameOf = (state, { score, lives }) => ({ state, action: null, score, lives });
const pageOf = (state) => state;
const howItEnded = () => "the game is over";

// Return the frames of a recording. stage.changes has for each of them [position, text, position, text, ...]: what differs
// from the page before. The first frame's is the whole page.
function recordingOf({ frames, changes, values }) {
  const indexOf = Object.fromEntries([...game.characters].map((character, i) => [character, i]));
  let page = new Uint8Array(T);
  return frames.map(([action, score, lives], i) => {
    page = page.slice();
    for (let k = 0; k < changes[i].length; k += 2) {
      page.set(Array.from(changes[i][k + 1], (character) => indexOf[character]), changes[i][k]);
    }
    return { state: page, action, score, lives, value: values[i] };
  });
}

// The address holds what an edit changed: position and character, and so on.
function written(state) {
  const recorded = recordings[from][branch].state;
  return [...state.keys()].filter((t) => state[t] !== recorded[t]).flatMap((t) => [t, state[t]]).join(".");
}

function unwritten(text, base) {
  const numbers = text === "" ? [] : text.split(".").map(Number);
  const state = base.state.slice();
  for (let k = 0; k < numbers.length; k += 2) {
    const [t, character] = numbers.slice(k, k + 2);
    if (!(t in state) || t % game.columns === WIDTH) return null;
    if (!game.characters[character] || game.characters[character] === "\n") return null;
    state[t] = character;
  }
  return { ...frameOf(state, base), edited: true };
}

// The parts of a line that have one colour. A character that cannot be printed is shown as a dot.
function partsOf(line) {
  const parts = [];
  for (const character of line) {
    const colour = game.colours[character];
    const printed = character >= " " && character <= "~" ? character : "·";
    if (parts.length && parts.at(-1).rgb === colour) parts.at(-1).text += printed;
    else parts.push({ text: printed, rgb: colour, ...(colour && { name: "own", colour: `rgb(${colour.join(" ")})` }) });
  }
  return parts;
}

function eventAt(i, name) {
  const [before, now] = [line[i - 1], line[i]];
  if (!before) return false;
  const over = before.action === GAME_OVER || before.action === RECORDING_ENDS;
  if (name === "game") return over;
  const gained = over ? 0 : now.score - before.score;
  return name === "gain" ? gained > 0 : gained < 0;
}

const firstCell = () => ({ row: 0, column: 0 });

function describedToo() {
  element("write").disabled = !held;
  return "";
}

// Hold the cursor in a cell.
function edit(cell) {
  held = true;
  look(cell);
  say(element("cell").textContent);
}

// Write a character where the cursor is.
function write(character) {
  const index = game.characters.indexOf(character);
  if (index < 0 || character === "\n") {
    element("cell").textContent = `The model knows no character '${character}'.`;
    return say(element("cell").textContent);
  }
  cursor ??= firstCell();
  held = true;
  const page = current().slice();
  page[cursor.row * game.columns + cursor.column] = index;
  change(page);
}

function typed({ key }) {
  if (key.startsWith("Arrow")) held = true;
  if (key === "Escape" && past.length === 0) letGo();
  if ([...key].length > 1) return false;
  write(key);
  return true;
}

function letGo() {
  held = false;
  element("write").disabled = true;
  element("page").blur();
  look(null);
}

const complete = () => {};
const grab = () => null;
const captionOfHead = () => "This head looks here";

// Underline what has been edited, and frame the cell that is written to.
function drawOver(context, w, h) {
  context.fillStyle = context.strokeStyle = style("--accent");
  if (line[shown.frame].edited) {
    const [page, recorded] = [current(), recordings[from][branch].state];
    for (let t = 0; t < T; t++) {
      if (page[t] === recorded[t]) continue;
      context.fillRect((t % game.columns) * w, (Math.floor(t / game.columns) + 1) * h - 2, w, 2);
    }
  }
  if (!held || !cursor) return;
  context.lineWidth = 2;
  context.strokeRect(cursor.column * w, cursor.row * h, w, h);
}

function begin() {
  const keys = "Arrow keys move a cursor over it, and any character is written there.";
  element("page").setAttribute("aria-label", `The page of text that the model reads. ${keys}`);
  element("speed").value = "10";
  element("map").disabled = true;
  element("write").oninput = ({ data }) => {
    element("write").value = "";
    if (data) write([...data].at(-1));
  };
}
