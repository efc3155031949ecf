// What page.js shows of any game but Breakout, whose pages are kept as text, and edited character by character.
"use strict";

const [ACTION, SCORE, LIVES] = [0, 1, 2]; // of a frame
const SCORE_NAME = "return";
const pages = unpackPages();

// Return the pages of all frames, one after the other. data.changes has for each frame [position, text, position, text,
// ...]: what differs from the page before. The first frame's is the whole page.
function unpackPages() {
  const pages = new Uint8Array(frames.length * T);
  const indexOf = Object.fromEntries([...game.characters].map((character, i) => [character, i]));
  data.changes.forEach((changes, i) => {
    if (i) pages.copyWithin(i * T, (i - 1) * T, i * T);
    for (let k = 0; k < changes.length; k += 2) {
      pages.set(Array.from(changes[k + 1], (character) => indexOf[character]), i * T + changes[k]);
    }
  });
  return pages;
}

const stateOf = (i) => pages.subarray(i * T, (i + 1) * T);
const pageOf = (state) => state;

// The parts of a line that have one colour. A character that cannot be printed is shown as a dot.
function partsOf(line) {
  const parts = [];
  for (const character of line) {
    const colour = game.colours[character];
    const printed = character >= " " && character <= "~" ? character : "·";
    if (parts.length && parts.at(-1).rgb === colour) parts.at(-1).text += printed;
    else parts.push({ text: printed, rgb: colour, name: colour && "own", colour: colour && `rgb(${colour.join(" ")})` });
  }
  return parts;
}

function eventAt(i, name) {
  const [before, now] = [frames[i - 1], frames[i]];
  if (!before) return false;
  if (name === "game") return before[ACTION] < 0;
  const gained = before[ACTION] < 0 ? 0 : now[SCORE] - before[SCORE];
  return name === "gain" ? gained > 0 : gained < 0;
}

const headName = (head) => stages[shown.stage].names[head][0];
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
  if (playing) pause();
  cursor ??= firstCell();
  held = true;
  edited = current().slice();
  edited[cursor.row * game.columns + cursor.column] = index;
  update();
}

function typed({ key }) {
  if (key.startsWith("Arrow")) held = true;
  if (key === "Escape" && !edited) letGo();
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

const forget = () => {};
const complete = () => {};

// Underline what has been edited, and frame the cell that is written to.
function drawOver(context, w, h) {
  context.fillStyle = context.strokeStyle = style("--accent");
  if (edited) {
    const recorded = stateOf(shown.frame);
    for (let t = 0; t < T; t++) {
      if (edited[t] === recorded[t]) continue;
      context.fillRect((t % game.columns) * w, (Math.floor(t / game.columns) + 1) * h - 2, w, 2);
    }
  }
  if (!held || !cursor) return;
  context.lineWidth = 2;
  context.strokeRect(cursor.column * w, cursor.row * h, w, h);
}

function begin() {
  const label = "The page of text that the model reads. Arrow keys move a cursor over it, and any character is written there.";
  element("page").setAttribute("aria-label", label);
  element("speed").value = "10";
  element("map").disabled = true;
  element("write").oninput = ({ data }) => {
    element("write").value = "";
    if (data) write([...data].at(-1));
  };
}
