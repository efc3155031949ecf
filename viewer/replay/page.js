// What is shown, and the line of frames through which one moves. look.js draws it, and live.js plays on.
//
// A frame is {state, action, score, lives, value}. Its action is the one chosen there, GAME_OVER, RECORDING_ENDS, or null
// while nothing has been chosen. In a frame that has been played here, `by` is the `reader` that chose, `best` is what it
// preferred, and `hand` is true if you chose. An edited frame has `edited`.
//
// What differs between Breakout and other games is in breakout.js and text.js; one of them follows. Each has
//   SCORE_NAME                     what the points are called
//   LIVE                           whether the rules are here (game.js), so that one can play on
//   recordingOf(stage)             the frames of a recording
//   pageOf(state)                  the page, as indices in game.characters
//   frameOf(state, base)           a frame in which nothing has been chosen yet; base is the frame that it replaces
//   howItEnded(frame)              what to say of the last frame of a game
//   written(state)                 an edited state as text for the address
//   unwritten(text, base)          the edited frame of such a text, or null if it makes none
//   partsOf(line, row)             the parts of a line of text that have one colour, each {text, name, colour}
//   eventAt(i, name)               whether an event happened between frame i and the one before
//   captionOfHead()                what the caption at the page says about it
//   describedToo(cell)             what else is to be said about a cell, or ""
//   edit(cell), typed(event)       what a click or Enter does in a cell, and any other key with the page in focus
//   grab(cell)                     what a pointer takes hold of: a function that moves it to a cell, or null
//   firstCell()                    where the cursor is at first
//   complete()                     what happens after a page is drawn
//   drawOver(context, w, h)        what is drawn over the heat; w and h are the size of a cell
//   begin()                        what is done once, at the start
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { stages, config, things, actions } = data;
const game = { ...config, ...data.game };
const T = game.rows * game.columns;
const WIDTH = game.columns - 1; // the newline is not drawn
const MEAN = "mean"; // of all heads, in place of the number of a head
const [GAME_OVER, RECORDING_ENDS] = [-1, -2]; // in place of an action, as in recording.py
const PAST = 100; // so many edits can be undone
const element = (id) => document.getElementById(id);
const percent = (share) => (share >= 0.0995 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)) + " %";
const ORDER = stages.at(-1).order; // of the heads, in which they stay at every stage
const stillness = matchMedia("(prefers-reduced-motion: reduce)");
const largest = (numbers) => numbers.indexOf(Math.max(...numbers));

const models = stages.map((stage) => new GPT(config, unpack(stage, data.weights)));
const shown = { frame: 0, head: MEAN, stage: stages.length - 1 };
const silent = new Set(); // the heads that are left out
for (const model of models) model.silent = silent;
let recordings; // the frames of each stage
let line; // the frames that are shown: a recording, or the beginning of one and what was edited and played after it
let from; // the stage with whose recording the line begins
let branch; // the first frame of the line that is not of the recording; Infinity if all are
const past = []; // what `undo` goes back to
let cursor = null; // the cell {row, column} that is described
let playing = null; // the number of the next animation frame, while time goes on
let answer = null; // what the model read last
let answered = null; // what `answer` belongs to
let held = false; // whether the cursor stays in its cell when the mouse moves
let later = null; // the timer of `settle`
let remark = ""; // at the end of the status

const current = () => line[shown.frame].state;
const textOf = (page) => Array.from(page, (character) => game.characters[character]).join("");

// Who reads: the model of a stage without the heads that are silent
const reader = () => `${shown.stage} ${[...silent]}`;

// Let it read the current page. Nothing is computed twice, for example when another head is chosen,
// which shows another part of the same answer.
function read() {
  const page = pageOf(current());
  const asked = `${reader()} ${textOf(page)}`;
  if (asked !== answered) answer = models[shown.stage].read(page);
  answered = asked;
  return answer;
}

// Show the current frame. said: a remark at the end of the status, which stays until something changes.
function update(said = "") {
  remark = said;
  read();
  draw();
  element("status").textContent = status();
  element("slider").max = framesOfChart() - 1;
  element("slider").value = shown.frame;
  element("slider").setAttribute("aria-valuetext", `step ${shown.frame}`);
  element("undo").disabled = past.length === 0;
  clearTimeout(later);
  if (!playing) later = setTimeout(settle, 300);
  complete();
}

function status() {
  const frame = line[shown.frame];
  const games = gameOf(line.length - 1);
  const number = games > 1 ? ` · game ${gameOf(shown.frame)} of ${games}` : "";
  const lives = frame.lives === undefined ? "" : ` · lives ${frame.lives}`;
  const ends = { [GAME_OVER]: ` · ${howItEnded(frame)}`, [RECORDING_ENDS]: " · the recording ends here" };
  const end = ends[frame.action] ?? "";
  const live = shown.frame >= branch ? (frame.edited ? " · edited" : " · played on here, not recorded") : "";
  const step = `Step ${shown.frame} of ${line.length - 1}${number}`;
  return `${step} · ${SCORE_NAME} ${frame.score}${lives}${live}${end}${remark && ` · ${remark}`}`;
}

// The number of the game that a frame belongs to
const gameOf = (i) => 1 + line.slice(0, i).filter((frame) => frame.action === GAME_OVER).length;

// Update the address and tell a screen reader what is shown. This is done only once nothing has moved for a while,
// because browsers limit how often the address may change, and a screen reader needs time to speak.
function settle() {
  const place = `#${address()}`;
  if (location.hash !== place) history.replaceState(null, "", place);
  const told = actions.map((name, i) => [name, answer.probabilities[i]]).filter(([, p]) => p >= 0.01 || !manyActions);
  say(`${element("status").textContent}. ${told.map(([name, p]) => `${name} ${p.toFixed(2)}`).join(", ")}`);
}

function say(text) {
  element("said").textContent = text;
}

function choose(change) {
  const { stage } = shown;
  hideCaptions();
  Object.assign(shown, change);
  if (shown.stage !== stage) {
    if (branch === Infinity) showRecording(); // each stage has its own, and a line that you made stays
    describeHeads();
  }
  markChosen();
  update();
}

// Show how a stage plays, from the beginning of its game.
function watchStage(stage) {
  choose({ stage });
  if (branch < Infinity) return;
  seek(0);
  if (!playing && !stillness.matches) play();
}

function showRecording() {
  from = shown.stage;
  line = recordings[from];
  branch = Infinity;
  if (shown.frame >= line.length) shown.frame = 0; // a shorter game than that of the stage before
}

function nextHead(step) {
  const all = [MEAN, ...ORDER];
  choose({ head: all[(all.indexOf(shown.head) + step + all.length) % all.length] });
}

function silence(head, off) {
  hideCaptions();
  if (off) silent.add(head);
  else silent.delete(head);
  if (LIVE && playing) leaveRecording();
  markChosen();
  update();
}

// Time

function seek(i) {
  shown.frame = Math.max(0, Math.min(line.length - 1, i));
  update();
}

// Go one step on. Returns whether there was one: at the end of the line there is while the game can be played on.
function forward() {
  if (shown.frame === line.length - 1 || hand !== null) return playOneStep();
  shown.frame += 1;
  return true;
}

function step(by) {
  if (playing) pause();
  if (by < 0) seek(shown.frame - 1);
  else if (forward()) update();
}

const jumpTo = (name) => document.querySelector(`[data-event=${name}]`);

function jump(name, step) {
  if (playing) pause();
  for (let i = shown.frame + step; i >= 0 && i < line.length; i += step) if (eventAt(i, name)) return seek(i);
  refuse(`no ${step > 0 ? "further" : "earlier"} ${jumpTo(name).textContent}`);
}

// Say why something is not done.
function refuse(reason) {
  say(reason);
  update(reason);
}

function play() {
  const { action, edited } = line[shown.frame];
  if (edited && !LIVE) return refuse("there are no rules to play on by; Undo goes back to the recording");
  const canGoOn = LIVE && (action === null || action === RECORDING_ENDS);
  if (shown.frame === line.length - 1 && !canGoOn) seek(0);
  if (LIVE && (action === RECORDING_ENDS || (shown.frame < branch && !isAsRecorded()))) leaveRecording();
  let due = performance.now();
  const tick = (now) => {
    const period = 1000 / element("speed").value;
    const steps = Math.floor((now - due) / period);
    if (steps > 0) {
      due += steps * period;
      if (now - due > 1000) due = now; // the tab was hidden
      let moved = true;
      for (let i = 0; i < Math.min(steps, 5) && moved; i++) moved = forward();
      if (!moved) return pause();
      update();
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

// Editing. An edit, or playing on, makes a new line, and the old one can be had back.

// Put a frame in place of frame i and of all that follow. unrecorded: the first frame that differs from the recording.
function branchOff(i, frame, unrecorded = i) {
  past.push({ line, from, branch, frame: shown.frame });
  if (past.length > PAST) past.shift();
  line = [...line.slice(0, i), frame];
  branch = Math.min(branch, unrecorded);
  shown.frame = i;
}

// Change the current state. again: whether this goes on with the last change, as while something is dragged. said: a
// remark on it.
function change(state, again = false, said = "") {
  if (playing) pause();
  hideCaptions();
  const frame = { ...frameOf(state, line[shown.frame]), edited: true };
  if (again) line[shown.frame] = frame;
  else branchOff(shown.frame, frame);
  update(said);
}

function undo() {
  if (past.length === 0) return;
  if (playing) pause();
  const before = past.pop();
  ({ line, from, branch } = before);
  shown.frame = before.frame;
  if (branch === Infinity && from !== shown.stage) showRecording();
  update();
}

// The address keeps what is shown, so that a link to it shows the same.

function address() {
  const parts = [`frame=${shown.frame}`, `head=${shown.head}`, `stage=${shown.stage}`];
  if (silent.size) parts.push(`off=${[...silent].sort((a, b) => a - b).join(".")}`);
  if (branch < Infinity) parts.push(`from=${from}`, `at=${branch}`, `line=${lineAsText()}`);
  return parts.join("&");
}

// Write the line from the branch on: for each frame a digit for the move that led to it, with a letter if it is repeated,
// 0b is 000, and in parentheses the state that an edit put in its place. A move of the recording is not written.
function lineAsText() {
  const text = line.slice(branch).map((frame, k) => {
    const before = line[branch + k - 1];
    const move = frame.edited && before?.best === undefined ? "" : moveAsDigit(before);
    return move + (frame.edited ? `(${written(frame.state)})` : "");
  });
  const letter = (run) => String.fromCharCode(95 + run.length);
  return text.join("").replace(/\([^)]*\)|(\d)\1{1,25}/g, (run, digit) => (digit ? digit + letter(run) : run));
}

// Restore the line of an address. Returns whether it makes one.
function restoreLine(stage, at, text) {
  const recorded = recordings[stage];
  if (!recorded || !(at >= 0 && at <= recorded.length)) return false;
  const frames = recorded.slice(0, at);
  const last = recorded[at - 1];
  if (text === "" && last) frames[at - 1] = { ...last, ...frameOf(last.state, last) }; // nothing has been played yet
  for (const [, state, digit, letter] of text.matchAll(/\(([^)]*)\)|(\d)([a-z]?)/g)) {
    const repeated = letter ? letter.charCodeAt(0) - 95 : 1;
    for (let k = 0; k < repeated; k++) {
      const instead = digit || frames.length > at ? frames.pop() : recorded[at];
      const added = digit ? playedOn(instead, digit) : [instead && unwritten(state, instead)];
      if (!added?.at(-1)) return false;
      frames.push(...added);
    }
  }
  past.push({ line, from, branch, frame: Math.min(at, line.length - 1) });
  [line, from, branch] = [frames, stage, at];
  return frames.length > at || frames.at(-1)?.action === null;
}

function recall() {
  if (playing) pause();
  const wanted = new URLSearchParams(location.hash.slice(1));
  const number = (name, high, otherwise) => {
    const value = Number.parseInt(wanted.get(name), 10);
    return value >= 0 && value <= high ? value : otherwise;
  };
  shown.head = number("head", config.n_head - 1, MEAN);
  shown.stage = number("stage", stages.length - 1, shown.stage);
  silent.clear();
  for (const [head] of wanted.get("off")?.matchAll(/\d+/g) ?? []) if (head < config.n_head) silent.add(Number(head));
  past.length = 0;
  let said = "";
  showRecording();
  const restored = () => restoreLine(number("from", stages.length - 1, 0), number("at", 1e9, -1), wanted.get("line"));
  if (wanted.has("line") && !restored()) {
    showRecording();
    past.length = 0;
    said = "the address adds something to the recording that cannot be read";
  }
  shown.frame = number("frame", line.length - 1, Math.min(shown.frame, line.length - 1));
  describeHeads();
  markChosen();
  update(said);
}

// Wiring

// What each key does. The argument is -1 with Shift, otherwise 1.
const keys = {
  " ": toggle,
  arrowleft: () => step(-1),
  arrowright: () => step(1),
  home: () => seek(0),
  end: () => seek(line.length - 1),
  h: nextHead,
  z: () => zoom(),
  escape: () => hideCaptions() || undo(),
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

// Whether a key belongs to the browser. AltGr, which Windows reports as Ctrl and Alt, only makes other characters.
const withModifier = (event) =>
  (event.ctrlKey || event.metaKey || event.altKey) && !event.getModifierState("AltGraph");

function keyOnPage(event) {
  if (withModifier(event)) return;
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const { row, column } = cursor ?? firstCell();
  const done = typed(event);
  if (event.key === "Enter") edit({ row, column });
  else if (move && !playing) {
    look({
      row: Math.max(0, Math.min(game.rows - 1, row + move[0])),
      column: Math.max(0, Math.min(WIDTH - 1, column + move[1])),
    });
    say(element("cell").textContent);
  } else if (!done) return;
  event.preventDefault();
  event.stopPropagation();
}

function cellAt(event) {
  const box = element("page").getBoundingClientRect();
  const { w, h } = sizes();
  const inside = (value, high) => Math.max(0, Math.min(high, Math.floor(value)));
  return {
    row: inside((event.clientY - box.top) / h, game.rows - 1),
    column: inside((event.clientX - box.left) / w, WIDTH - 1),
  };
}

function look(cell) {
  cursor = cell;
  describeCell();
  drawHeat();
}

// The pointer on the page: it inspects, drags, or edits where it is released without having moved.
function wirePage() {
  const page = element("page");
  let move = null; // what is dragged
  let dragged = false; // whether it has been moved
  let last = null; // the cell in which the pointer was
  page.onpointerdown = (event) => {
    if (event.button) return;
    last = cellAt(event);
    look(last); // because a finger, unlike a mouse, has not moved there before
    move = grab(last);
    if (LIVE && playing && event.pointerType === "mouse") pause(); // so that a second try meets what it aims at
    dragged = false;
    if (move) page.setPointerCapture(event.pointerId);
  };
  page.onpointermove = (event) => {
    const cell = cellAt(event);
    if (!move) return held || look(cell);
    if (cell.row === last.row && cell.column === last.column) return; // the hand only trembles
    last = cell;
    dragged = true;
    cursor = cell;
    move(cell);
  };
  // Who clicks goes on with the keys that play; only where one types does the page take the focus.
  page.onmousedown = (event) => {
    if (!LIVE) return;
    event.preventDefault();
    document.activeElement.blur();
  };
  page.onpointerup = page.onpointercancel = () => (move = null);
  page.onpointerleave = ({ pointerType }) => {
    // A finger leaves when it is lifted.
    const stays = held || pointerType === "touch" || document.activeElement === page;
    if (!stays) look(null);
  };
  // A finger that takes hold of something does not scroll.
  const noScroll = (event) => grab(cellAt(event.touches[0])) && event.preventDefault();
  page.addEventListener("touchstart", noScroll, { passive: false });
  page.onclick = (event) => dragged || edit(cellAt(event));
  page.onkeydown = keyOnPage;
}

function wireControls() {
  element("slider").oninput = () => {
    const wanted = Number(element("slider").value); // which `pause` sets back
    if (playing) pause();
    seek(wanted);
  };
  element("stage").max = stages.length - 1;
  element("stage").oninput = () => watchStage(Number(element("stage").value));
  element("play").onclick = toggle;
  element("back").onclick = () => step(-1);
  element("forward").onclick = () => step(1);
  element("undo").onclick = undo;
  element("afresh").onclick = () => {
    history.replaceState(null, "", location.pathname + location.search);
    location.reload();
  };
  element("zoom").onclick = zoom;
  for (const button of document.querySelectorAll(`#controls .${document.body.classList[0]} [data-event]`)) {
    keys[button.dataset.key] = (way) => jump(button.dataset.event, way);
    button.onclick = () => jump(button.dataset.event, 1);
  }
  element("heads").onkeydown = (event) => {
    const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (!by || withModifier(event) || event.target.type === "checkbox") return;
    nextHead(by);
    element("heads").querySelector("[aria-checked=true]").focus();
    event.preventDefault();
    event.stopPropagation();
  };
  element("chart").onpointerdown = element("chart").onpointermove = (event) => {
    if (!event.buttons) return;
    if (playing) pause();
    seek(frameAt(event.offsetX));
  };
}

function wireKeys() {
  document.onkeydown = (event) => {
    const key = event.key.toLowerCase();
    const kept = event.target.type === "text" ? key !== "escape" : own[event.target.type]?.includes(key);
    if (kept || withModifier(event) || !keys[key] || (event.repeat && key === " ")) return;
    keys[key](event.shiftKey ? -1 : 1);
    event.preventDefault();
  };
  // After a click the keys belong to the page again. Who uses the keyboard keeps the focus where it is.
  let pointed = false;
  addEventListener("pointerdown", () => (pointed = true), true);
  addEventListener("keydown", () => (pointed = false), true);
  const letGo = ({ target }) => pointed && target.closest("input:not([type=text]), select, button")?.blur();
  addEventListener("change", letGo);
  addEventListener("click", (event) => event.target.matches("select") || letGo(event));
}

function start() {
  recordings = stages.map(recordingOf);
  build();
  wirePage();
  wireControls();
  wireKeys();
  begin();
  addEventListener("hashchange", recall);
  dark.addEventListener("change", redraw);
  recall();
  let seen = ""; // Only these sizes count, because redraw() itself changes the board's height with what it writes.
  const resized = () => {
    const width = element("board").clientWidth; // 0 while a match hides it
    const now = `${width} ${innerHeight}`;
    if (width && now !== seen) redraw();
    seen = now;
  };
  new ResizeObserver(resized).observe(element("board"));
  addEventListener("resize", resized);
  if (location.hash.length < 2) open();
}

// What one sees who opens the page without a place in its address: a game that moves, and three captions.
function open() {
  choose({ head: ORDER[0] });
  showCaptions();
  if (!stillness.matches) play();
}
